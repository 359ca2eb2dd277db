use std::fs;
use std::path::Path;
use std::time::Duration;

use rcgen::{
    CertificateParams, CertifiedIssuer, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384,
};

use super::pair::PairError;
use super::*;
use crate::control::store::Store;

const NAMES: [&str; 2] = ["vms.example.org", "*.vms.example.org"];

fn domain() -> Domain {
    let settings = Settings::parse("domain = \"vms.example.org\"", Path::new("/t")).unwrap();
    settings.domain
}

/// Chain and key in PEM, valid for `names` from and until so many days from now.
fn issue(names: &[&str], from: i64, until: i64, key: &KeyPair) -> String {
    let day = |days: i64| {
        let distance = Duration::from_secs(days.unsigned_abs() * 86_400);
        match days < 0 {
            true => SystemTime::now() - distance,
            false => SystemTime::now() + distance,
        }
    };
    let authority = KeyPair::generate().unwrap();
    let issuer = CertifiedIssuer::self_signed(CertificateParams::default(), authority).unwrap();
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    let mut parameters = CertificateParams::new(names).unwrap();
    parameters.not_before = day(from).into();
    parameters.not_after = day(until).into();
    let leaf = parameters.signed_by(key, &issuer).unwrap();
    format!("{}{}", leaf.pem(), issuer.pem())
}

struct Place {
    directory: tempfile::TempDir,
    files: CertificateFiles,
}

fn place() -> Place {
    let directory = tempfile::tempdir().unwrap();
    let files = CertificateFiles {
        chain: directory.path().join("chain.pem"),
        key: directory.path().join("key.pem"),
    };
    Place { directory, files }
}

impl Place {
    fn write(&self, chain: &str, key: &str) {
        fs::write(&self.files.key, key).unwrap();
        fs::write(&self.files.chain, chain).unwrap();
    }

    fn read(&self) -> Result<Pair, PairError> {
        Pair::read(&self.files, &wildcard(&domain()), SystemTime::now())
    }
}

fn new_pair() -> (String, String) {
    let key = KeyPair::generate().unwrap();
    (issue(&NAMES, -1, 90, &key), key.serialize_pem())
}

#[test]
fn a_good_pair_is_taken_in_every_form_of_key() {
    let place = place();
    for algorithm in [&PKCS_ECDSA_P256_SHA256, &PKCS_ECDSA_P384_SHA384] {
        let key = KeyPair::generate_for(algorithm).unwrap();
        let chain = issue(&NAMES, -1, 90, &key);
        place.write(&chain, &key.serialize_pem());
        let pair = place.read().unwrap();
        assert_eq!(pair.chain.len(), 2);
        let days = pair.expires.duration_since(SystemTime::now()).unwrap();
        assert_eq!(days.as_secs() / 86_400, 89);
        // What proxy does with it, and what OpenSSL makes of it in SEC 1.
        rustls::crypto::ring::sign::any_supported_type(
            &rustls::pki_types::PrivatePkcs8KeyDer::from(pair.key.clone()).into(),
        )
        .unwrap();
        openssl(&place, &["ec", "-in", "key.pem", "-out", "sec1.pem"]);
        let sec1 = fs::read_to_string(place.directory.path().join("sec1.pem")).unwrap();
        assert!(sec1.contains("BEGIN EC PRIVATE KEY"));
        place.write(&chain, &sec1);
        let same = place.read().unwrap();
        rustls::crypto::ring::sign::any_supported_type(
            &rustls::pki_types::PrivatePkcs8KeyDer::from(same.key).into(),
        )
        .unwrap();
    }
    openssl(
        &place,
        &["genrsa", "-traditional", "-out", "rsa.pem", "2048"],
    );
    openssl(
        &place,
        &[
            "req",
            "-x509",
            "-key",
            "rsa.pem",
            "-subj",
            "/CN=x",
            "-days",
            "9",
            "-out",
            "chain.pem",
            "-addext",
            "subjectAltName=DNS:vms.example.org,DNS:*.vms.example.org",
        ],
    );
    let rsa = fs::read_to_string(place.directory.path().join("rsa.pem")).unwrap();
    assert!(rsa.contains("BEGIN RSA PRIVATE KEY"));
    fs::write(&place.files.key, rsa).unwrap();
    let pair = place.read().unwrap();
    rustls::crypto::ring::sign::any_supported_type(
        &rustls::pki_types::PrivatePkcs8KeyDer::from(pair.key).into(),
    )
    .unwrap();
}

fn openssl(place: &Place, arguments: &[&str]) {
    let output = std::process::Command::new("openssl")
        .args(arguments)
        .current_dir(place.directory.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn a_pair_that_clients_would_refuse_is_refused_with_its_reason() {
    let place = place();
    let (chain, key) = new_pair();
    let message = |place: &Place| place.read().unwrap_err().to_string();
    assert!(message(&place).contains("cannot read") && message(&place).contains("chain.pem"));
    place.write("nothing", &key);
    assert!(message(&place).contains("chain.pem holds no certificates"));
    place.write(&chain, "nothing");
    assert!(message(&place).contains("key.pem holds no private key"));
    place.write(&chain, &new_pair().1);
    assert!(message(&place).contains("is not that of the first certificate"));
    place.write(&chain.repeat(9), &key);
    assert!(message(&place).contains("at most 16 certificates"));
    place.write(&format!("{chain}{}", " ".repeat(1 << 20)), &key);
    assert!(message(&place).contains("at most 1 MiB"));
    place.write(&chain, &key);
    fs::remove_file(&place.files.key).unwrap();
    nix::unistd::mkfifo(&place.files.key, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(message(&place).contains("no regular file"));
    fs::remove_file(&place.files.key).unwrap();
    let made = KeyPair::generate().unwrap();
    for (names, from, until, expected) in [
        (&NAMES[..1], -1, 90, "not for *.vms.example.org"),
        (&NAMES[1..], -1, 90, "not for vms.example.org"),
        (&["example.org", "*.example.org"], -1, 90, "not for *.vms"),
        (&NAMES[..], -9, -1, "has expired"),
        (&NAMES[..], 1, 90, "not valid yet"),
    ] {
        place.write(&issue(names, from, until, &made), &made.serialize_pem());
        assert!(message(&place).contains(expected), "{}", message(&place));
    }
}

fn open(place: &Place) -> Certificates {
    let settings = Settings {
        domain: domain(),
        certificates: Some(place.files.clone()),
        ..Settings::default()
    };
    opened(place, &settings)
}

fn opened(place: &Place, settings: &Settings) -> Certificates {
    let store = Store::open(&place.directory.path().join("state")).unwrap();
    let authority = Authority::open(&store).unwrap();
    Certificates::open(authority, settings, &store.keys())
}

async fn changed(changes: &mut watch::Receiver<u64>) {
    let wait = tokio::time::timeout(Duration::from_secs(60), changes.changed());
    wait.await.expect("the change is never told").unwrap();
}

#[tokio::test]
async fn a_pair_that_is_replaced_is_shown_and_a_broken_one_is_not() {
    let place = place();
    let certificates = open(&place);
    let shown = || certificates.leaf(&[]).unwrap().chain[0].clone();
    let of = |chain: &str| {
        use rustls::pki_types::pem::PemObject;
        rustls::pki_types::CertificateDer::from_pem_slice(chain.as_bytes())
            .unwrap()
            .to_vec()
    };
    let mut changes = certificates.changes();
    let work = async {
        assert_ne!(shown(), shown(), "the authority's, made anew each time");
        // In place.
        let (first, key) = new_pair();
        place.write(&first, &key);
        changed(&mut changes).await;
        assert_eq!(shown(), of(&first));
        // A broken one, then a good one: only the good one is told.
        place.write("broken", &key);
        sleep(QUIET * 3).await;
        assert_eq!(shown(), of(&first));
        // By a rename, as most tools do it.
        let (second, key) = new_pair();
        let aside = place.directory.path().join("aside");
        fs::write(&aside, &key).unwrap();
        fs::rename(&aside, &place.files.key).unwrap();
        fs::write(&aside, &second).unwrap();
        fs::rename(&aside, &place.files.chain).unwrap();
        changed(&mut changes).await;
        assert_eq!(shown(), of(&second));
        // By links into a directory elsewhere, as certbot does it.
        let (third, key) = new_pair();
        let archive = place.directory.path().join("archive");
        fs::create_dir(&archive).unwrap();
        fs::write(archive.join("chain"), &third).unwrap();
        fs::write(archive.join("key"), &key).unwrap();
        for (target, link) in [("chain", &place.files.chain), ("key", &place.files.key)] {
            std::os::unix::fs::symlink(Path::new("archive").join(target), &aside).unwrap();
            fs::rename(&aside, link).unwrap();
        }
        changed(&mut changes).await;
        assert_eq!(shown(), of(&third));
        let (fourth, key) = new_pair();
        fs::write(archive.join("chain"), &fourth).unwrap();
        fs::write(archive.join("key"), &key).unwrap();
        changed(&mut changes).await;
        assert_eq!(shown(), of(&fourth));
    };
    tokio::select! {
        () = certificates.follow() => unreachable!(),
        () = work => {}
    }
}

#[tokio::test]
async fn a_directory_that_is_replaced_by_a_link_is_followed() {
    use std::os::unix::fs::symlink;
    // As Kubernetes does it: files are links through `..data`, and that is replaced by a rename.
    let place = place();
    let at = |name: &str| place.directory.path().join(name);
    let issue = |directory: &str| {
        let (chain, key) = new_pair();
        fs::create_dir(at(directory)).unwrap();
        fs::write(at(directory).join("chain.pem"), chain).unwrap();
        fs::write(at(directory).join("key.pem"), key).unwrap();
    };
    issue("first");
    symlink("first", at("..data")).unwrap();
    symlink("..data/chain.pem", &place.files.chain).unwrap();
    symlink("..data/key.pem", &place.files.key).unwrap();
    let certificates = open(&place);
    let shown = || certificates.leaf(&[]).unwrap().chain[0].clone();
    let first = shown();
    let mut changes = certificates.changes();
    let work = async {
        sleep(QUIET).await;
        issue("second");
        symlink("second", at("..data_tmp")).unwrap();
        fs::rename(at("..data_tmp"), at("..data")).unwrap();
        fs::remove_dir_all(at("first")).unwrap();
        changed(&mut changes).await;
        assert_ne!(shown(), first);
    };
    tokio::select! {
        () = certificates.follow() => unreachable!(),
        () = work => {}
    }
}

#[tokio::test]
async fn files_whose_directory_comes_later_are_found() {
    let mut place = place();
    let later = place.directory.path().join("later/still");
    place.files.chain = later.join("chain.pem");
    place.files.key = later.join("key.pem");
    let certificates = open(&place);
    let mut changes = certificates.changes();
    let work = async {
        tokio::task::yield_now().await;
        fs::create_dir_all(&later).unwrap();
        sleep(QUIET * 3).await;
        let (chain, key) = new_pair();
        place.write(&chain, &key);
        changed(&mut changes).await;
    };
    tokio::select! {
        () = certificates.follow() => unreachable!(),
        () = work => {}
    }
}

fn acme_settings(place: &Place) -> Settings {
    let text = format!(
        "domain = \"vms.example.org\"\n[acme]\nserver = \"192.0.2.53:53\"\nzone = \"example.org\"\n\
         key_name = \"supvm\"\nkey_file = \"{}\"\n",
        place.directory.path().join("tsig").display()
    );
    Settings::parse(&text, Path::new("/t")).unwrap()
}

/// What an authority makes of an order, valid from and until so many days from now.
fn issued(order: &OrderCertificate, from: i64, until: i64) -> CertificateOrdered {
    let key = KeyPair::generate().unwrap();
    let issuer = CertifiedIssuer::self_signed(CertificateParams::default(), key).unwrap();
    let request =
        rcgen::CertificateSigningRequestParams::from_der(&order.request.as_slice().into());
    let mut request = request.unwrap();
    let day = |days: i64| {
        SystemTime::now() + Duration::from_secs(40 * 86_400)
            - Duration::from_secs(((40 - days) * 86_400).unsigned_abs())
    };
    request.params.not_before = day(from).into();
    request.params.not_after = day(until).into();
    let leaf = request.signed_by(&issuer).unwrap();
    CertificateOrdered {
        ticket: order.ticket,
        chain: format!("{}{}", leaf.pem(), issuer.pem()),
        message: String::new(),
    }
}

fn is_due(certificates: &Certificates) -> bool {
    use futures::FutureExt;
    certificates.due().now_or_never().is_some()
}

#[tokio::test]
async fn a_certificate_is_ordered_once_kept_and_renewed_at_two_thirds_of_its_life() {
    let place = place();
    fs::write(place.directory.path().join("tsig"), "c2VjcmV0\n").unwrap();
    let settings = acme_settings(&place);
    let certificates = opened(&place, &settings);
    assert!(is_due(&certificates));
    let servers = ["192.0.2.1:53".parse().unwrap()];
    let order = certificates.order(0, &servers).unwrap();
    assert_eq!(order.key_secret, b"secret");
    assert_eq!(order.names, NAMES);
    assert!(!is_due(&certificates), "it is under way");
    // An answer that nobody waits for.
    let mut stray = issued(&order, -1, 30);
    stray.ticket += 1;
    certificates.ordered(&stray);
    let mut changes = certificates.changes();
    certificates.ordered(&issued(&order, -1, 30));
    changed(&mut changes).await;
    assert!(!is_due(&certificates));
    let shown = certificates.leaf(&[]).unwrap();
    assert_eq!(shown.chain.len(), 2);
    // The next control has it too, and the same account.
    drop(certificates);
    let certificates = opened(&place, &settings);
    assert!(!is_due(&certificates));
    assert_eq!(certificates.leaf(&[]).unwrap().chain, shown.chain);
    let again = certificates.order(0, &servers).unwrap();
    assert_eq!(again.account_key, order.account_key);
    assert_ne!(
        again.request, order.request,
        "a new key for each certificate"
    );
    for file in ["acme.pem", "acme-account.key"] {
        use std::os::unix::fs::PermissionsExt;
        let path = place.directory.path().join("state/keys").join(file);
        let mode = fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
    // Two thirds of 30 days: not at 19, but at 21.
    certificates.ordered(&issued(&again, -19, 11));
    assert!(!is_due(&certificates));
    let again = certificates.order(0, &servers).unwrap();
    certificates.ordered(&issued(&again, -21, 9));
    assert!(is_due(&certificates));
}

#[tokio::test]
async fn a_failed_order_changes_nothing_and_is_not_repeated_at_once() {
    let place = place();
    let settings = acme_settings(&place);
    let certificates = opened(&place, &settings);
    assert!(
        certificates.order(0, &[]).is_none(),
        "without the key of the zone"
    );
    assert!(!is_due(&certificates));
    fs::write(place.directory.path().join("tsig"), "c2VjcmV0").unwrap();
    let changes = certificates.changes();
    for bad in [
        |_: &mut CertificateOrdered| {},
        |answer: &mut CertificateOrdered| answer.chain = String::new(),
        |answer: &mut CertificateOrdered| answer.chain = "no certificate".into(),
    ] {
        let order = certificates.order(0, &[]).unwrap();
        let other = OrderCertificate {
            request: certificates.order(0, &[]).unwrap().request,
            ..order.clone()
        };
        // For another key than that of the order that is waited for.
        let mut answer = issued(&order, -1, 30);
        answer.ticket = order.ticket + 1;
        assert_ne!(other.request, order.request);
        bad(&mut answer);
        certificates.ordered(&answer);
        assert!(!is_due(&certificates));
    }
    assert!(!changes.has_changed().unwrap());
    assert!(!place.directory.path().join("state/keys/acme.pem").exists());
    // A new line to proxy: what was under way is lost, the pause is not.
    certificates.order(0, &[]).unwrap();
    certificates.begin();
    assert!(!is_due(&certificates));
}

#[tokio::test]
async fn single_names_have_certificates_of_their_own_one_after_the_other() {
    use futures::FutureExt;
    let place = place();
    let label = "abcdefghijklmnopqrst";
    let text = format!(
        "domain = \"vms.example.org\"\nacme = {{}}\n[[domains]]\nname = \"app.example.com\"\n\
         vm = \"{label}\"\n"
    );
    let settings = Settings::parse(&text, Path::new("/t")).unwrap();
    let certificates = opened(&place, &settings);
    let mut shown = Vec::new();
    for (which, name) in ["vms.example.org", "app.example.com"]
        .into_iter()
        .enumerate()
    {
        assert_eq!(certificates.due().now_or_never(), Some(which));
        let order = certificates.order(which, &[]).unwrap();
        assert_eq!(order.names, [name]);
        assert_eq!(order.update_server, "", "proved by TLS-ALPN-01");
        assert!(!is_due(&certificates), "one at a time");
        certificates.ordered(&issued(&order, -1, 30));
        shown.push(name.to_owned());
        let beside = certificates.beside();
        let named: Vec<String> = beside.named.into_iter().map(|named| named.name).collect();
        assert_eq!(named, shown);
        // VMs' names are never ordered: they have the built-in authority's.
        let leaf = certificates.leaf(&[]).unwrap();
        assert_eq!(leaf.chain[1], beside.authority);
    }
    assert!(!is_due(&certificates));
    // The next control has them, too.
    drop(certificates);
    let certificates = opened(&place, &settings);
    assert!(!is_due(&certificates));
    assert_eq!(certificates.beside().named.len(), 2);
    // One that fails is tried again later, also by the next control; the other is not held up.
    let failed = CertificateOrdered {
        ticket: certificates.order(0, &[]).unwrap().ticket,
        chain: String::new(),
        message: "no".into(),
    };
    certificates.ordered(&failed);
    drop(certificates);
    for file in ["acme.pem", "acme-app.example.com.pem"] {
        fs::remove_file(place.directory.path().join("state/keys").join(file)).unwrap();
    }
    let certificates = opened(&place, &settings);
    assert_eq!(certificates.due().now_or_never(), Some(1));
}

#[tokio::test]
async fn what_has_expired_is_shown_no_longer() {
    let place = place();
    fs::write(place.directory.path().join("tsig"), "c2VjcmV0").unwrap();
    let certificates = opened(&place, &acme_settings(&place));
    let order = certificates.order(0, &[]).unwrap();
    let mut soon = issued(&order, -1, 1);
    // A certificate that is good for a few seconds more.
    let key = KeyPair::generate().unwrap();
    let issuer = CertifiedIssuer::self_signed(CertificateParams::default(), key).unwrap();
    let request =
        rcgen::CertificateSigningRequestParams::from_der(&order.request.as_slice().into());
    let mut request = request.unwrap();
    request.params.not_before = (SystemTime::now() - Duration::from_secs(100)).into();
    request.params.not_after = (SystemTime::now() + Duration::from_secs(3)).into();
    soon.chain = request.signed_by(&issuer).unwrap().pem();
    certificates.ordered(&soon);
    let now = SystemTime::now();
    assert_eq!(certificates.leaf(&[]).unwrap().chain.len(), 1);
    assert!(certificates.beside().authority.is_empty());
    let until = certificates.until(now);
    assert!(
        until <= now + Duration::from_secs(4),
        "it is looked at again then"
    );
    while SystemTime::now() < until {
        clock::until(until).await;
    }
    let leaf = certificates.leaf(&[]).unwrap();
    assert_eq!(leaf.chain[1], certificates.beside().authority);
    assert!(certificates.until(until) > until + Duration::from_secs(86_400));
}

#[tokio::test]
async fn an_order_that_nobody_lives_to_answer_is_not_repeated_at_once() {
    let place = place();
    fs::write(place.directory.path().join("tsig"), "c2VjcmV0").unwrap();
    let settings = acme_settings(&place);
    let certificates = opened(&place, &settings);
    certificates.order(0, &[]).unwrap();
    // Proxy died.
    certificates.begin();
    assert!(!is_due(&certificates));
    // Control died, too.
    drop(certificates);
    assert!(!is_due(&opened(&place, &settings)));
}
