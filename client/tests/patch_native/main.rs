//! Patches by `sup run` against the whole appliance but for the machine: the real control, proxy and
//! agent, and real commands.
#![cfg(feature = "patch")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../common/native.rs"]
mod native;
mod transfers;
mod wires;

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use client::protocol::vm::VmRef;
use native::{Appliance, TOKEN};
use serde_json::{Value, json};
use wires::*;

/// A limit that only a hang reaches; a server is given up on after twice that.
const HANG: Duration = Duration::from_secs(30);

/// An appliance, and a user with a home that is empty at first.
struct World {
    appliance: Arc<Appliance>,
    home: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        Self {
            appliance: Appliance::shared(),
            home: tempfile::tempdir().unwrap(),
        }
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.home.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    /// Runs are of one patch: they share what it keeps.
    fn sup(&self, source: &str, arguments: &[&str]) -> Command {
        let patch = self.file("patch.js", source);
        let mut command = Command::new(env!("CARGO_BIN_EXE_sup"));
        command
            .env_clear()
            .env("HOME", self.home.path())
            .env("SUP_ENDPOINT", self.appliance.unix())
            .env("SUP_TOKEN", TOKEN)
            .current_dir(self.home.path())
            .arg("run")
            .arg(patch)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn run(&self, source: &str, arguments: &[&str]) -> (i32, String, String) {
        let Output {
            status,
            stdout,
            stderr,
        } = self.sup(source, arguments).output().unwrap();
        (
            status.code().unwrap(),
            String::from_utf8(stdout).unwrap(),
            String::from_utf8(stderr).unwrap(),
        )
    }

    /// The result of a script in which `vm` is a VM that is taken away at the end, `thrown` gives
    /// what a function throws, and `plain` an object without its texts of output.
    fn told(&self, source: &str) -> Value {
        self.json(&format!(
            "const thrown = (f) => {{ try {{ f() }} catch (e) {{ return [e.name, e.code ?? e.exitCode, e.reason ?? e.path ?? null] }} }};
             const ends = (r) => [r.exitCode, r.error ?? null];
             const vm = sup.vm(); try {{\n{source}\n}} finally {{ vm.delete() }}"
        ))
    }

    fn json(&self, source: &str) -> Value {
        let (code, out, said) = self.run(source, &["--json"]);
        assert_eq!(code, 0, "{said}");
        serde_json::from_str(&out).unwrap()
    }
}

#[test]
fn commands_give_output_by_source_and_every_kind_of_end_its_reason() {
    let world = World::new();
    let told = world.told(
        "vm.exec('mkdir sub; printf x > file');
         const both = vm.execResult('echo out; sleep 0.1; echo err >&2; sleep 0.1; echo out');
         return [both.output, both.stdout, both.stderr, ends(both),
           vm.exec(''), vm.exec(['printf', '%s|', 'a b', '$HOME', '']),
           vm.exec('pwd', { cwd: 'sub' }), vm.exec('echo $A$B', { env: { A: 1, B: null } }),
           vm.exec('echo ${HOME-none}', { env: { HOME: undefined } }),
           ends(vm.execResult('exit 3')), ends(vm.execResult(['no-such-program'])),
           ends(vm.execResult(['./file'])), ends(vm.execResult('true', { cwd: 'none' })),
           ends(vm.execResult('kill -SEGV $$')), ends(vm.execResult('kill -KILL $$'))]",
    );
    assert_eq!(
        told,
        json!([
            "out\nerr\nout\n",
            "out\nout\n",
            "err\n",
            [0, null],
            "",
            "a b|$HOME||",
            "/workspace/sub\n",
            "1\n",
            "none\n",
            [3, "Command failed"],
            [127, "not found: no-such-program"],
            [126, "not executable: ./file"],
            [126, "no such directory: none"],
            [139, "killed by signal SIGSEGV"],
            [137, "killed by signal SIGKILL"],
        ])
    );
}

#[test]
fn a_failed_command_throws_all_that_is_known() {
    let world = World::new();
    let told = world.told(
        "try { vm.exec('echo one; sleep 0.1; echo two >&2; exit 4') } catch (e) {
           return [e instanceof SupVMExecError, e instanceof Error, e.name, e.exitCode, e.stdout, e.stderr, e.output,
             e.reason === undefined, e.message.includes('exit 4'), e.message.endsWith('two')] }",
    );
    assert_eq!(
        told,
        json!([
            true,
            true,
            "SupVMExecError",
            4,
            "one\n",
            "two\n",
            "one\ntwo\n",
            true,
            true,
            true
        ])
    );
}

#[test]
fn output_of_any_kind_and_size_arrives() {
    let world = World::new();
    let told = world.told(
        "const big = vm.exec('head -c 104857600 /dev/zero | tr \"\\\\0\" x');
         const binary = vm.exec(\"printf 'a\\\\000\\\\377b'\");
         const cut = vm.exec(\"printf '\\\\303'; sleep 0.2; printf '\\\\251'\");
         return [big.length, big[0], big.at(-1), binary, cut]",
    );
    assert_eq!(told, json!([104_857_600, "x", "x", "a\u{0}\u{fffd}b", "é"]));
}

#[test]
fn sessions_keep_directory_and_variables_and_a_missing_one_is_told_at_the_next_command() {
    let world = World::new();
    let told = world.told(
        "const s = vm.session(); const first = s.cwd ?? null;
         vm.exec('mkdir -p app/api'); s.cd('app'); s.cd('./api/../api'); s.setEnv('A', 'b'); s.setEnv('HOME', null);
         const seen = s.exec('pwd; echo $A ${HOME-none}'); s.env.A = 'changed';
         const stream = s.execStreaming(['pwd']).block();
         s.cd('/none'); const missing = [ends(s.execResult('true')), thrown(() => s.exec('true')), s.execStreaming('true').blockResult().error];
         return [first, seen, stream, s.env, s.cwd, ...missing]",
    );
    let missing = "no such directory: /none";
    assert_eq!(
        told,
        json!([
            null,
            "/workspace/app/api\nb none\n",
            "/workspace/app/api\n",
            {"A": "b"},
            "/none",
            [126, missing],
            ["SupVMExecError", 126, missing],
            missing,
        ])
    );
}

#[test]
fn a_chunk_reaches_the_script_while_the_command_runs_and_each_reader_reads_all() {
    let world = World::new();
    let told = world.told(
        // The command ends only after the script has answered its first line.
        "const h = vm.execStreaming('echo one; while [ ! -e go ]; do sleep 0.01; done; echo two; echo three >&2');
         const running = h.status; let text = '';
         for (const piece of h.output()) { text += piece; if (piece === 'one\\n') vm.exec('touch go') }
         const two = [h.stdout(), h.stdout()].map((reader) => [...reader].join(''));
         return [running, text, two, [...h.stderr()].join(''), h.block().length, h.status, h.tail(2), h.tail(0)]",
    );
    assert_eq!(
        told,
        json!([
            {"state": "running"},
            "one\ntwo\nthree\n",
            ["one\ntwo\n", "one\ntwo\n"],
            "three\n",
            14,
            {"state": "exited", "exitCode": 0},
            ["two", "three"],
            [],
        ])
    );
}

#[test]
fn input_reaches_a_process_until_its_end_is_sent() {
    let world = World::new();
    let told = world.told(
        "const h = vm.execStreaming('sort'); h.sendStdin('b\\n'); h.sendStdin('a\\n'.repeat(100000)); h.sendEOF(); h.sendEOF();
         const sorted = h.block(); const failed = vm.execStreaming('echo so; exit 2');
         return [sorted.length, sorted.endsWith('a\\nb\\n'), thrown(() => h.sendStdin('late')),
           thrown(() => failed.block()), ends(failed.blockResult()), failed.status]",
    );
    assert_eq!(
        told,
        json!([
            200_002,
            true,
            ["SupVMError", "NOT_RUNNING", null],
            ["SupVMExecError", 2, null],
            [2, "Command failed"],
            {"state": "exited", "exitCode": 2},
        ])
    );
}

#[test]
fn a_kill_in_the_middle_of_reading_ends_the_reading() {
    let world = World::new();
    let told = world.told(
        "const h = vm.execStreaming('while :; do echo on; sleep 0.01; done'); let pieces = 0;
         for (const piece of h.output()) { pieces += 1; if (pieces === 3) h.kill() }
         const end = h.blockResult();
         const gone = vm.execStreaming(['no-such-program']); h.kill();
         return [h.status.state, h.status.exitCode > 128, end.exitCode > 128, end.error !== undefined, pieces >= 3,
           gone.status, ends(gone.blockResult())]",
    );
    assert_eq!(
        told,
        json!([
            "killed",
            true,
            true,
            true,
            true,
            {"state": "error", "exitCode": 127},
            [127, "not found: no-such-program"],
        ])
    );
}

const PNG: &[u8] =
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x01\0\0\0\x01\x08\x06\0\0\0\x1f\x15\xc4\x89";

#[test]
fn what_was_kept_comes_back_alive_in_the_next_run() {
    let world = World::new();
    let first = world.json(
        "const vm = sup.vm(); const s = vm.session(); s.setEnv('A', 'kept'); s.cd('/tmp');
         const h = vm.execStreaming('echo early; cat');
         sup.global.set('all', { vm, s, h, media: sup.file(new Uint8Array([0, 255])) }); return vm.id",
    );
    let second = world.json(
        "const { vm, s, h, media } = sup.global.get('all'); h.sendStdin('late\\n'); h.sendEOF();
         return [vm.id, s.exec('pwd; echo $A'), h.block(), media.size, vm.upload(media), sup.get('none')]",
    );
    assert_eq!(
        second,
        json!([first, "/tmp\nkept\n", "early\nlate\n", 2, "file.bin", null])
    );
    // Another deletes it; the object of the first only finds it gone.
    let third = world.json(
        "const { vm, h } = sup.global.get('all'); const same = sup.global.get('all').vm; same.delete(); same.delete();
         const code = (f) => { try { f() } catch (e) { return e.code ?? e.reason } };
         return [vm.execResult('true'), h.status, vm.execStreaming('true').blockResult().error, code(() => same.exec('true')), code(() => vm.exec('true')),
           [...h.output()], [...h.stderr()], h.tail(3), h.blockResult().error, code(() => h.block()), code(() => h.sendStdin('x'))]",
    );
    assert_eq!(
        third,
        json!([
            {"output": "", "stdout": "", "stderr": "", "exitCode": 255, "error": "VM not found"},
            {"state": "error", "exitCode": 255},
            "VM not found",
            "VM_DELETED",
            "VM not found",
            [],
            [],
            [],
            "VM not found",
            "VM not found",
            "VM_NOT_FOUND",
        ])
    );
}

#[test]
fn output_beyond_what_a_call_returns_is_a_failure_that_says_so_and_ends_the_command() {
    let world = World::new();
    let told = world.told(
        "const much = vm.execResult('echo $$ > pid; exec yes 123456789');
         const gone = vm.exec('kill -0 $(cat pid) 2>&1 || echo gone').includes('gone');
         return [much.exitCode, much.error.includes('execStreaming'), much.output === much.stdout, much.output.length < 2e6,
           much.output.startsWith('123456789\\n'), /dropped here]\\n$/.test(much.output), gone]",
    );
    assert_eq!(told, json!([255, true, true, true, true, true, true]));
}

#[test]
fn a_generator_that_is_drawn_from_late_tells_what_was_dropped_before_and_the_process_has_gone_on() {
    let world = World::new();
    let told = world.told(
        "const h = vm.execStreaming('yes 123456789 | head -c 80000000; echo end'); const reader = h.output();
         for (let i = 0; h.status.state === 'running' && i < 600; i += 1) sup.sleep(50);
         const state = h.status.state; const first = reader.next().value; reader.return();
         return [state, first.replace(/[0-9]+/, 'N').split('\\n')[0]]",
    );
    let marker = "[supvm: N bytes of output were dropped here]";
    assert_eq!(told, json!(["exited", marker]));
}

#[test]
fn a_second_interrupt_ends_it_at_once_and_leaves_no_temporary_files() {
    let world = World::new();
    let temporary = world.home.path().join("tmp");
    std::fs::create_dir(&temporary).unwrap();
    let mut command = world.sup(
        "const vm = sup.vm(); sup.file(new Uint8Array([1])); sup.status(vm.id);
         vm.exec(\"trap 'touch asked' TERM; touch here; while :; do sleep 0.01; done\")",
        &[],
    );
    let mut run = command.env("TMPDIR", &temporary).spawn().unwrap();
    let mut id = String::new();
    let mut said = BufReader::new(run.stderr.take().unwrap());
    said.read_line(&mut id).unwrap();
    let workspace = world.appliance.root_of(id.trim()).join("workspace");
    let pid = nix::unistd::Pid::from_raw(run.id().try_into().unwrap());
    for sign in ["here", "asked"] {
        let begin = Instant::now();
        while !workspace.join(sign).exists() {
            assert!(begin.elapsed() < HANG, "{sign}");
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_ne!(std::fs::read_dir(&temporary).unwrap().count(), 0, "{sign}");
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    }
    assert_eq!(run.wait().unwrap().code(), Some(130));
    assert_eq!(std::fs::read_dir(&temporary).unwrap().count(), 0);
}

#[test]
fn two_runs_at_once_keep_what_both_set() {
    let world = World::new();
    let script = "for (let i = 0; i < 100; i += 1) sup.global.set(`${sup.input.text}-${i}`, i)";
    // Both commands first: each writes the patch's file, which no run may read meanwhile.
    let commands = ["a", "b"].map(|name| world.sup(script, &["--text", name]));
    let runs = commands.map(|mut command| command.spawn().unwrap());
    for run in runs {
        let done = run.wait_with_output().unwrap();
        assert!(done.status.success(), "{done:?}");
    }
    assert_eq!(world.json("return sup.global.keys().length"), json!(200));
}

#[test]
fn a_vm_that_stops_under_a_command_is_a_result_and_starts_again_for_the_next() {
    let world = World::new();
    let client = world.appliance.blocking();
    let mut run = world
        .sup(
            "const vm = sup.vm(); sup.status(vm.id); const cut = vm.execResult('touch here; sleep 1000');
             const next = vm.exec('ls'); vm.delete(); return [cut.exitCode, cut.error, next]",
            &["--json"],
        )
        .spawn()
        .unwrap();
    let mut said = BufReader::new(run.stderr.take().unwrap());
    let mut id = String::new();
    said.read_line(&mut id).unwrap();
    let vm: VmRef = id.trim().parse().unwrap();
    let here = world.appliance.root_of(id.trim()).join("workspace/here");
    while !here.exists() {
        std::thread::sleep(Duration::from_millis(5));
    }
    client.stop(vm, None).unwrap();
    let done = run.wait_with_output().unwrap();
    let told: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(told, json!([255, "VM stopped", "here\n"]));
}

#[test]
fn an_uncaught_error_shows_the_scripts_stack_and_an_appliance_out_of_reach_throws() {
    let world = World::new();
    let (code, out, said) = world.run("function f() {\n  null.x\n}\nf()", &[]);
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(
        said.contains("TypeError") && said.contains("patch.js:2"),
        "{said}"
    );
    let mut command = world.sup("return sup.vm().execResult('true')", &[]);
    let done = command
        .env("SUP_ENDPOINT", "unix:/nowhere/x")
        .output()
        .unwrap();
    let said = String::from_utf8(done.stderr).unwrap();
    assert_eq!(done.status.code(), Some(1), "{said}");
    assert!(
        said.contains("SupVMError") && said.contains("/nowhere/x"),
        "{said}"
    );
}

#[test]
fn a_stream_handle_is_in_error_after_its_vm_was_restarted_and_its_output_is_kept() {
    let world = World::new();
    let id = world.json(
        "const vm = sup.vm(); const h = vm.execStreaming('echo said; exec sleep 1000');
         for (const piece of h.output()) if (piece.includes('said')) break;
         sup.global.set('all', { vm, h }); return vm.id",
    );
    let client = world.appliance.blocking();
    client
        .stop(id.as_str().unwrap().parse().unwrap(), None)
        .unwrap();
    let told = world.json(
        "const { vm, h } = sup.global.get('all'); let thrown; const status = h.status;
         try { h.block() } catch (e) { thrown = [e.name, e.exitCode, e.reason, e.output] }
         let late; try { h.sendStdin('x') } catch (e) { late = e.code }
         h.sendEOF(); h.kill(); vm.delete();
         return [status, thrown, late]",
    );
    assert_eq!(
        told,
        json!([
            {"state": "error", "exitCode": 255},
            ["SupVMExecError", 255, "VM was restarted", "said\n"],
            "NOT_RUNNING",
        ])
    );
}

#[test]
fn output_beyond_what_a_log_keeps_is_marked_where_it_is_missing() {
    let world = World::new();
    let told = world.told(
        "const h = vm.execStreaming('yes 123456789 | head -c 80000000; echo end');
         while (h.status.state === 'running') sup.sleep(50);
         const { output, droppedBytes } = h.blockResult();
         const first = output.slice(0, output.indexOf('\\n'));
         return [first.replace(/[0-9]+/, 'N'), droppedBytes > 8e6 && Number(/[0-9]+/.exec(first)[0]) === droppedBytes,
           output.length > 5e7, output.length < 7e7, output.endsWith('\\nend\\n'), h.tail(1)]",
    );
    assert_eq!(
        told,
        json!([
            "[supvm: N bytes of output were dropped here]",
            true,
            true,
            true,
            true,
            ["end"]
        ])
    );
}

#[test]
fn a_lost_connection_in_the_middle_of_a_command_loses_nothing_of_it() {
    let world = World::new();
    let near = world.home.path().join("wire");
    let wire = Wire::new(&near, world.appliance.unix());
    let mut run = world
        .sup(
            "const vm = sup.vm(); sup.status('go');
             const all = vm.exec('for i in 1 2 3 4 5 6; do echo $i; sleep 0.2; done');
             const h = vm.execStreaming('for i in 1 2 3 4 5 6; do echo $i; sleep 0.2; done');
             sup.status('again'); const again = [...h.output()].join('');
             vm.delete(); return [all, again]",
            &["--json"],
        )
        .env("SUP_ENDPOINT", format!("unix:{}", near.display()))
        .spawn()
        .unwrap();
    let mut said = BufReader::new(run.stderr.take().unwrap());
    for _ in 0..2 {
        let mut line = String::new();
        said.read_line(&mut line).unwrap();
        std::thread::sleep(Duration::from_millis(500));
        assert!(wire.cut() > 0, "{line}");
    }
    let done = run.wait_with_output().unwrap();
    let told: Value = serde_json::from_slice(&done.stdout).unwrap();
    let whole = "1\n2\n3\n4\n5\n6\n";
    assert_eq!(told, json!([whole, whole]));
}

const LONG: usize = 10_000_000;

#[test]
fn an_interrupt_ends_the_wait_for_a_server_that_says_nothing() {
    let world = World::new();
    for answer in ["", "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"] {
        let (url, answered) = stalls(answer);
        for call in [
            format!("sup.file('{url}')"),
            format!("sup.vm().upload('{url}', 'x')"),
        ] {
            let mut run = world.sup(&call, &[]).spawn().unwrap();
            answered.recv_timeout(HANG).unwrap();
            let pid = nix::unistd::Pid::from_raw(run.id().try_into().unwrap());
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
            let begin = Instant::now();
            let code = loop {
                if let Some(status) = run.try_wait().unwrap() {
                    break status.code();
                }
                if begin.elapsed() > HANG {
                    run.kill().unwrap();
                    panic!("{call} goes on after {answer:?}");
                }
                std::thread::sleep(Duration::from_millis(5));
            };
            assert_eq!(code, Some(130), "{call} {answer:?}");
        }
    }
}

#[test]
fn commands_and_options_that_make_no_sense_are_type_errors() {
    let world = World::new();
    let told = world.told(
        "const name = (f) => { try { f(); return 'none' } catch (e) { return e.name } };
         return [name(() => vm.exec([])), name(() => vm.exec(1)), name(() => vm.exec(['a', 1])), name(() => vm.exec('a\\0')),
                 name(() => vm.exec('a', { env: { 'A=B': 1 } })), name(() => vm.session().setEnv('A\\0', '')),
                 name(() => vm.exec(['a'], { cwd: 1 })), name(() => vm.upload(1)), name(() => vm.exec(''))]",
    );
    let mut expected = vec!["TypeError"; 8];
    expected.push("none");
    assert_eq!(told, json!(expected));
}

#[test]
fn sessions_change_directories_by_text_alone() {
    let world = World::new();
    let told = world.told(
        "const s = vm.session(); const seen = [];
         for (const dir of ['app/./x', '../y/', '/srv//a/..', '../../..', 'b']) { s.cd(dir); seen.push(s.cwd) }
         s.setEnv('A', 1); s.setEnv('B', 'x'); s.setEnv('B', undefined); s.env.C = 'not kept';
         return [...seen, s.env]",
    );
    assert_eq!(
        told,
        json!(["/workspace/app/x", "/workspace/app/y", "/srv", "/", "/b", {"A": "1"}])
    );
}

#[test]
fn abandoned_loops_do_not_use_up_the_readers() {
    let world = World::new();
    let told = world.told(
        "const h = vm.execStreaming('echo one');
         for (let i = 0; i < 300; i += 1) for (const piece of h.output()) break;
         return [h.block(), h.tail(-1)]",
    );
    assert_eq!(told, json!(["one\n", []]));
}

#[test]
fn loops_that_stay_open_are_refused_before_they_use_up_the_connection() {
    let world = World::new();
    let told = world.told(
        "const h = vm.execStreaming('echo one; exec sleep 1000'); const open = []; let refused;
         try { for (;;) { const reader = h.output(); reader.next(); open.push(reader) } } catch (e) { refused = e.code }
         const still = vm.exec('echo on'); h.kill();
         return [open.length, refused, still]",
    );
    assert_eq!(told, json!([128, "TOO_MANY_READERS", "on\n"]));
}

#[test]
fn a_process_that_ends_well_when_it_is_killed_has_not_failed() {
    let world = World::new();
    let told = world.told(
        "const h = vm.execStreaming(\"trap 'echo bye; exit 0' TERM; echo up; read line\");
         for (const piece of h.stdout()) break;
         h.kill();
         return [h.status, h.block(), h.blockResult()]",
    );
    let output = "up\nbye\n";
    assert_eq!(
        told,
        json!([
            {"state": "killed", "exitCode": 0},
            output,
            {"output": output, "stdout": output, "stderr": "", "exitCode": 0},
        ])
    );
}

#[test]
fn a_vm_that_another_object_deleted_is_an_error_of_each_handle_and_its_own_deletion_throws() {
    let world = World::new();
    let told = world.json(
        "const vm = sup.vm(); sup.global.set('vm', vm); sup.global.get('vm').delete();
         const thrown = (f) => { try { f() } catch (e) { return [e.name, e.code ?? e.exitCode, e.reason ?? null] } };
         const late = vm.execStreaming('x');
         const seen = [late.status, thrown(() => late.block()), [...late.output()], late.tail(3), thrown(() => late.sendStdin('x'))];
         vm.delete(); vm.delete();
         return [...seen, thrown(() => vm.execResult('x')), thrown(() => vm.session()), typeof vm.id]",
    );
    assert_eq!(
        told,
        json!([
            {"state": "error", "exitCode": 255},
            ["SupVMExecError", 255, "VM not found"],
            [],
            [],
            ["SupVMError", "NOT_RUNNING", null],
            ["SupVMError", "VM_DELETED", null],
            ["SupVMError", "VM_DELETED", null],
            "string",
        ])
    );
}
