//! VMs in the world: their servers at their public addresses, and what they reach themselves. What
//! the gateway and the edge do in each case is tested natively, in `proxy`.

use std::process::Stdio;

use client::protocol::network::{Egress, Rule, RuleAction, RuleProtocol};
use protocol::vm::{VmInfo, VmState};
use tokio::io::AsyncReadExt;
use tokio::process::Command;

use super::origin::{ADDRESS, Origin, unpacked};
use super::talk::{Talk, eventually, part, shell};
use super::{Context, Failure, ensure};
use crate::vm;

/// What curl got.
#[derive(Debug, PartialEq, Eq)]
struct Page {
    /// Zero: no answer.
    status: u16,
    version: String,
    body: String,
}

/// Asks as a visitor who trusts the appliance's authority.
async fn visit(context: &Context, url: &str, more: &[&str]) -> Result<Page, Failure> {
    let output = Command::new("curl")
        .args(["--silent", "--max-time", "120", "--cacert"])
        .arg(context.appliance.home().join("ca.pem"))
        .args(["--write-out", "\n%{http_code} %{http_version}"])
        .args(more)
        .arg(url)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await?;
    let text = String::from_utf8_lossy(&output.stdout);
    let (body, last) = text.rsplit_once('\n').unwrap_or(("", &text));
    let (status, version) = last.split_once(' ').unwrap_or(("0", ""));
    Ok(Page {
        status: status.parse()?,
        version: version.to_owned(),
        body: body.to_owned(),
    })
}

const SERVER: &str = r#"
require('http').createServer((ask, answer) => {
  let got = 0;
  ask.on('data', (part) => { got += part.length });
  ask.on('end', () => answer.end(JSON.stringify({ path: ask.url, host: ask.headers.host,
    proto: ask.headers['x-forwarded-proto'], got })));
}).listen(Number(process.argv[2]), process.argv[3]);
"#;

pub(crate) async fn a_server_in_a_vm_is_reached_at_its_public_address(
    context: &mut Context,
) -> Result<(), Failure> {
    let made = context.create().await?;
    let port = context.appliance.edge_port();
    let url = made.url.clone();
    ensure(url.ends_with(&format!(".supvm.localhost:{port}")), || {
        url.clone()
    })?;
    part("nothing listens", async {
        let page = visit(context, &url, &[]).await?;
        ensure(page.status == 502 && page.body.contains("3000"), || {
            format!("{page:?}")
        })?;
        let nobody = url.replace(made.subdomain.as_str(), "aaaaaaaaaaaaaaaaaaaa");
        let page = visit(context, &nobody, &[]).await?;
        ensure(page.status == 404, || format!("{page:?}"))
    })
    .await?;

    let talk = Talk::with(context, &made).await?;
    let write = format!("cat > server.js <<'END'\n{SERVER}\nEND");
    talk.shell(&write).await?;
    for (port, address) in [(3000, "0.0.0.0"), (3001, "127.0.0.1"), (3002, "::1")] {
        talk.start_log(&shell(&format!("exec node server.js {port} {address}"))?)
            .await?;
    }
    part("a server on every address", answers(context, &made, None)).await?;
    part("one on 127.0.0.1", answers(context, &made, Some(3001))).await?;
    part("one on ::1", answers(context, &made, Some(3002))).await?;
    part("HTTP/2 and a long upload", async {
        let upload = tempfile::NamedTempFile::new()?;
        upload.as_file().set_len(8 << 20)?;
        let data = format!("@{}", upload.path().display());
        let page = visit(context, &url, &["--http2", "--data-binary", &data]).await?;
        ensure(
            page.status == 200 && page.version == "2" && page.body.contains("\"got\":8388608"),
            || format!("{page:?}"),
        )
    })
    .await?;

    part("a proxy that was killed", async {
        let mut probe = context.probe().await?;
        probe
            .run("kill -9 $(ps -o pid,args | awk '/[s]upvm proxy/ { print $1 }')")
            .await?;
        eventually("the address answers again", async || {
            Ok(visit(context, &url, &[]).await?.status == 200)
        })
        .await
    })
    .await?;
    part("a stopped VM is started by a request", async {
        context.client.stop(vm::reference(&made), None).await?;
        let page = visit(context, &url, &[]).await?;
        ensure(page.status == 502, || format!("{page:?}"))?;
        let info = context.client.get(vm::reference(&made)).await?;
        ensure(info.state == VmState::Running, || format!("{info:?}"))
    })
    .await?;
    context.delete(&made).await?;
    let page = visit(context, &url, &[]).await?;
    ensure(page.status == 404, || format!("after the end: {page:?}"))
}

async fn answers(context: &Context, made: &VmInfo, port: Option<u16>) -> Result<(), Failure> {
    let url = match port {
        None => made.url.clone(),
        Some(port) => made.url.replace("https://", &format!("https://{port}-")),
    };
    let host = url.trim_start_matches("https://");
    let wanted = format!(r#"{{"path":"/a?b","host":"{host}","proto":"https","got":0}}"#);
    let mut last = None;
    let listens = eventually("the server answers", async || {
        let page = visit(context, &format!("{url}/a?b"), &[]).await?;
        let good = page.status == 200 && page.body == wanted;
        last = Some(page);
        Ok(good)
    });
    match listens.await {
        Ok(()) => Ok(()),
        Err(error) => Err(Failure::new(format!("{error}: {last:?}"))),
    }
}

/// Makes a git repository, a Python package, a npm registry and a Debian archive below /srv/origin;
/// `$1` is where they will be served.
const FIXTURES: &str = r#"
set -e
mkdir -p /srv/origin/simple/hello-there /srv/origin/npm/tar /srv/origin/apt /srv/work && cd /srv/work
git init -q repo && cd repo && echo hello > README && git add README
git -c user.name=t -c user.email=t@example.org commit -q -m one && cd ..
git clone -q --bare repo /srv/origin/repo.git && git -C /srv/origin/repo.git update-server-info
python3 - <<'END'
import zipfile
name = 'hello_there-1.0-py3-none-any.whl'
with zipfile.ZipFile('/srv/origin/simple/hello-there/' + name, 'w') as wheel:
    info = 'hello_there-1.0.dist-info/'
    wheel.writestr('hello_there.py', 'said = "hello from pip"\n')
    wheel.writestr(info + 'METADATA', 'Metadata-Version: 2.1\nName: hello-there\nVersion: 1.0\n')
    wheel.writestr(info + 'WHEEL', 'Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
    wheel.writestr(info + 'RECORD', 'hello_there.py,,\n')
open('/srv/origin/simple/hello-there/index.html', 'w').write(f'<a href="{name}">{name}</a>')
END
mkdir package && echo 'module.exports = "hello from npm"' > package/index.js
echo '{"name":"hello-npm","version":"1.0.0"}' > package/package.json
tar -czf /srv/origin/npm/tar/hello-npm-1.0.0.tgz package
printf '{"name":"hello-npm","dist-tags":{"latest":"1.0.0"},"versions":{"1.0.0":{"name":"hello-npm","version":"1.0.0","dist":{"tarball":"%s/npm/tar/hello-npm-1.0.0.tgz"}}}}' "$1" > /srv/origin/npm/hello-npm
mkdir -p deb/DEBIAN deb/usr/bin && printf '#!/bin/sh\necho hello from apt\n' > deb/usr/bin/hello-apt && chmod 755 deb/usr/bin/hello-apt
printf 'Package: hello-apt\nVersion: 1.0\nArchitecture: all\nMaintainer: t <t@example.org>\nDescription: t\n' > deb/DEBIAN/control
dpkg-deb --build deb /srv/origin/apt/hello-apt_1.0_all.deb > /dev/null
cd /srv/origin/apt && dpkg-scanpackages . 2> /dev/null > Packages
printf 'Date: %s\nSHA256:\n %s %s Packages\n' "$(date -Ru)" "$(sha256sum Packages | cut -d ' ' -f 1)" "$(stat -c %s Packages)" > Release
"#;

pub(crate) async fn git_pip_npm_and_apt_reach_what_the_rules_open(
    context: &mut Context,
) -> Result<(), Failure> {
    let mut origin = Origin::bind().await?;
    let url = origin.url();
    let rule = Rule {
        action: RuleAction::Allow,
        to: format!("{ADDRESS}/32").parse()?,
        protocol: RuleProtocol::Tcp,
        ports: (origin.port(), origin.port()),
    };
    let made = vm::create(&context.client, |request| {
        request.cpus = Some(1);
        request.egress = Egress {
            rules: vec![rule],
            ..Egress::default()
        };
    })
    .await?;
    part("what will be served", async {
        let fixtures = format!("set -- {url}\n{FIXTURES}");
        context.shell(&made, &fixtures).await?;
        let mut archive = Vec::new();
        let vm = context.client.vm(vm::reference(&made));
        vm.pack("/srv/origin")
            .await?
            .read_to_end(&mut archive)
            .await?;
        let files = unpacked(&archive)?;
        ensure(files.contains_key("repo.git/info/refs"), || {
            format!("{:?}", files.keys())
        })?;
        origin.serve(files);
        context
            .shell(&made, "rm -rf /srv/origin /srv/work")
            .await
            .map(drop)
    })
    .await?;
    let tools = tools(&url);
    for (tool, line, wanted) in &tools {
        let says = async {
            let said = context.shell(&made, line).await?;
            ensure(said.ends_with(wanted), || format!("{line}: {said}"))
        };
        part(tool, says).await?;
    }
    context.delete(&made).await?;

    part("a VM without the rule", async {
        let other = context.create().await?;
        for (tool, line, wanted) in &tools {
            let said = context.shell(&other, &format!("({line}) 2>&1; echo exit $?")).await?;
            let failed = !said.ends_with("exit 0") && !said.contains(wanted);
            ensure(failed, || format!("{tool} without the rule: {said}"))?;
        }
        let line = format!("curl -s --max-time 60 {url}/repo.git/HEAD; echo $?");
        // 7: refused at once, not 28, which is silence.
        let said = context.shell(&other, &line).await?;
        ensure(said == "7", || said.clone())?;
        let own = "getent ahostsv4 $(uname -n) | head -1; ip -6 route get fd73:7570::1 > /dev/null && echo six";
        let said = context.shell(&other, own).await?;
        ensure(said.ends_with("six"), || said.clone())?;
        context.delete(&other).await
    })
    .await
}

/// What is fetched from the origin, each by its tool: the tool, what to run, and what that says in the
/// end. None tries again by itself.
fn tools(url: &str) -> [(&'static str, String, &'static str); 4] {
    [
        (
            "git",
            format!("git clone -q {url}/repo.git cloned && cat cloned/README"),
            "hello",
        ),
        (
            "pip",
            format!(
                "pip install -q --no-cache-dir --disable-pip-version-check --retries 0 \
                 --trusted-host {ADDRESS} --index-url {url}/simple --target there hello-there && \
                 PYTHONPATH=there python3 -c 'import hello_there; print(hello_there.said)'"
            ),
            "hello from pip",
        ),
        (
            "npm",
            format!(
                "mkdir -p n && cd n && npm install --no-audit --no-fund --silent --fetch-retries 0 \
                 --registry {url}/npm/ hello-npm && node -p 'require(\"hello-npm\")'"
            ),
            "hello from npm",
        ),
        (
            "apt",
            format!(
                "echo 'deb [trusted=yes] {url}/apt ./' > /etc/apt/sources.list && \
                 rm -rf /etc/apt/sources.list.d/* && \
                 apt-get -qq update -o APT::Update::Error-Mode=any && \
                 apt-get -qq install hello-apt > /dev/null && hello-apt"
            ),
            "hello from apt",
        ),
    ]
}
