//! VMs as a script sees them: commands, sessions, streams and transfers.
#![cfg(feature = "patch")]
#![allow(clippy::unwrap_used, missing_docs)]

mod patch_common;

use std::io::{Read, Write};
use std::sync::{Arc, Mutex};

use patch_common::World;
use serde_json::json;

#[test]
fn exec_gives_merged_output_and_throws_with_everything_known() {
    let world = World::new();
    let told = world.json(
        "const vm = sup.vm(); const out = vm.exec('mixed');
         try { vm.exec('fail') } catch (e) {
           return [vm.id, vm.url, out, e instanceof Error, e instanceof SupVMExecError, e.name, e.exitCode,
                   e.stdout, e.stderr, e.output, e.reason === undefined, e.message]
         }",
    );
    assert_eq!(
        told,
        json!([
            "vm-11111111",
            "https://11111111.example",
            "one\ntwo\nthree\n",
            true,
            true,
            "SupVMExecError",
            3,
            "a\n",
            "b\n",
            "a\nb\n",
            true,
            "Command failed (exit code 3): fail\na\nb"
        ])
    );
}

#[test]
fn exec_result_has_an_error_only_after_a_failure() {
    let world = World::new();
    let told = world.json(
        "const vm = sup.vm(); return ['mixed', 'fail', 'missing', 'crash'].map((c) => vm.execResult(c))",
    );
    assert_eq!(
        told,
        json!([
            {"output": "one\ntwo\nthree\n", "stdout": "one\nthree\n", "stderr": "two\n", "exitCode": 0},
            {"output": "a\nb\n", "stdout": "a\n", "stderr": "b\n", "exitCode": 3, "error": "Command failed"},
            {"output": "", "stdout": "", "stderr": "", "exitCode": 127, "error": "not found: missing"},
            {"output": "", "stdout": "", "stderr": "", "exitCode": 139, "error": "killed by signal SIGSEGV"},
        ])
    );
}

#[test]
fn a_vm_that_is_gone_is_a_result_and_only_its_own_deletion_throws() {
    let world = World::new();
    let told = world.json(
        "const vm = sup.vm(); sup.global.set('vm', vm); const h = vm.execStreaming('server');
         sup.global.get('vm').delete();
         const result = vm.execResult('x');
         const late = vm.execStreaming('x');
         const thrown = (f) => { try { f() } catch (e) { return [e.name, e.code ?? e.exitCode, e.reason] } };
         const seen = [result, h.status, h.blockResult().error, late.status, thrown(() => late.block()),
                       [...late.output()], late.tail(3), thrown(() => late.sendStdin('x')), thrown(() => vm.exec('x'))];
         vm.delete(); vm.delete();
         return [...seen, thrown(() => vm.execResult('x')), thrown(() => vm.session()), vm.id]",
    );
    let gone =
        json!({"output": "", "stdout": "", "stderr": "", "exitCode": 255, "error": "VM not found"});
    let error = json!({"state": "error", "exitCode": 255});
    assert_eq!(
        told,
        json!([
            gone,
            error,
            "VM not found",
            error,
            ["SupVMExecError", 255, "VM not found"],
            [],
            [],
            ["SupVMError", "NOT_RUNNING", null],
            ["SupVMExecError", 255, "VM not found"],
            ["SupVMError", "VM_DELETED", null],
            ["SupVMError", "VM_DELETED", null],
            "vm-11111111"
        ])
    );
}

#[test]
fn an_appliance_out_of_reach_throws_even_from_exec_result() {
    let world = World::new();
    let told = world.json(
        "try { sup.vm().execResult('unreachable') } catch (e) { return [e.name, e.code, e.message] }",
    );
    assert_eq!(told, json!(["SupVMError", "UNREACHABLE", "nobody answers"]));
}

#[test]
fn what_the_appliance_or_the_agent_refuses_or_breaks_is_a_result() {
    let world = World::new();
    let told = world.json(
        "const vm = sup.vm(); return ['REFUSED', 'BROKEN', 'TOO_MANY_STREAMS'].map((c) => [vm.execResult(c).exitCode, vm.execResult(c).error])
           .concat(['UNREACHABLE', 'UNAUTHENTICATED'].map((c) => { try { vm.execResult(c) } catch (e) { return e.code } }))",
    );
    assert_eq!(
        told,
        json!([
            [255, "so it is"],
            [255, "so it is"],
            [255, "so it is"],
            "UNREACHABLE",
            "UNAUTHENTICATED"
        ])
    );
}

#[test]
fn commands_and_options_that_make_no_sense_are_type_errors() {
    let world = World::new();
    let told = world.json(
        "const vm = sup.vm(); const name = (f) => { try { f(); return 'none' } catch (e) { return e.name } };
         return [name(() => vm.exec([])), name(() => vm.exec(1)), name(() => vm.exec(['a', 1])), name(() => vm.exec('a\\0')),
                 name(() => vm.exec('a', { env: { 'A=B': 1 } })), name(() => vm.session().setEnv('A\\0', '')),
                 name(() => vm.exec(['a'], { cwd: 1 })), name(() => vm.upload(1)), name(() => vm.exec(''))]",
    );
    let type_error = "TypeError";
    let mut expected = vec![type_error; 8];
    expected.push("none");
    assert_eq!(told, json!(expected));
}

#[test]
fn sessions_change_directories_by_text_and_keep_their_variables() {
    let world = World::new();
    let told = world.json(
        "const s = sup.vm().session(); const seen = [s.cwd === undefined];
         for (const dir of ['app/./x', '../y/', '/srv//a/..', '../../..', 'b']) { s.cd(dir); seen.push(s.cwd) }
         s.setEnv('A', 1); s.setEnv('B', 'x'); s.setEnv('B', undefined); s.env.C = 'not kept';
         s.execResult(['ls', '-l']);
         return [...seen, s.env]",
    );
    assert_eq!(
        told,
        json!([true, "/workspace/app/x", "/workspace/app/y", "/srv", "/", "/b", {"A": "1"}])
    );
    let recorded = world.memory.0.lock().unwrap();
    let (_, command) = recorded.commands.last().unwrap();
    assert_eq!(command.cwd.as_deref(), Some("/b"));
    assert_eq!(
        command.env,
        [("A".into(), Some("1".into())), ("B".into(), None)]
    );
}

#[test]
fn every_reader_of_a_stream_begins_at_the_oldest_byte() {
    let world = World::new();
    let told = world.json(
        "const h = sup.vm().execStreaming('mixed'); const seen = [];
         for (const piece of h.output()) { seen.push(piece); break }
         return [seen, [...h.output()], [...h.stdout()], [...h.stderr()], h.block(), h.blockResult().stderr, h.tail(2), h.tail(0), h.tail(-1), h.status]",
    );
    assert_eq!(
        told,
        json!([["one\n"], ["one\n", "two\n", "three\n"], ["one\n", "three\n"], ["two\n"], "one\ntwo\nthree\n",
               "two\n", ["two", "three"], [], [], {"state": "exited", "exitCode": 0}])
    );
}

#[test]
fn abandoned_loops_do_not_use_up_the_readers() {
    let world = World::new();
    let told = world.json(
        "const h = sup.vm().execStreaming('mixed');
         for (let i = 0; i < 600; i++) for (const piece of h.output()) break;
         return h.block().length",
    );
    assert_eq!(told, json!(14));
}

#[test]
fn characters_cut_between_chunks_stay_whole_and_gaps_are_marked() {
    let world = World::new();
    let told = world.json(
        "const vm = sup.vm(); const cut = vm.execResult('cut');
         return [cut.stdout, cut.output, [...vm.execStreaming('cut').stdout()], vm.execStreaming('gap').block()]",
    );
    assert_eq!(
        told,
        json!([
            "é\n",
            "-é\n",
            ["é\n"],
            "[supvm: 7 bytes of output were dropped here]\ngap\n"
        ])
    );
}

#[test]
fn streams_take_input_and_can_be_killed() {
    let world = World::new();
    let told = world.json(
        "const h = sup.vm().execStreaming('server'); const before = h.status;
         h.sendStdin('a'); h.sendStdin('b\\n'); h.sendEOF(); h.sendEOF(); h.kill();
         return [before, h.status]",
    );
    assert_eq!(
        told,
        json!([{"state": "running"}, {"state": "killed", "exitCode": 143}])
    );
    assert_eq!(world.memory.0.lock().unwrap().stdin, "ab\n<EOF><EOF>");
}

#[test]
fn a_hundred_mebibytes_of_output_arrive_whole() {
    let world = World::new();
    let told = world.json(
        "const r = sup.vm().execResult('big'); return [r.output.length, r.stdout.length, r.stderr]",
    );
    assert_eq!(told, json!([100 << 20, 100 << 20, ""]));
}

#[test]
fn uploads_are_named_by_type_and_return_the_path_as_given() {
    let world = World::new();
    let png = world.file("photo.jpg", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR");
    let told = world.json(&format!(
        "const vm = sup.vm();
         return [vm.upload(sup.image('{png}')), vm.upload('text'), vm.upload('{{\"a\":1}}'), vm.upload('x', 'a/b.js'), vm.upload('y', '/etc/z'),
                 vm.upload(sup.file(new Uint8Array([0, 1, 2]))), vm.cat('a/b.js')]"
    ));
    assert_eq!(
        told,
        json!([
            "image.png",
            "file.txt",
            "file.json",
            "a/b.js",
            "/etc/z",
            "file.bin",
            "x"
        ])
    );
    let recorded = world.memory.0.lock().unwrap();
    assert_eq!(recorded.files["/workspace/file.bin"], [0, 1, 2]);
    assert_eq!(recorded.files["/etc/z"], b"y");
}

#[test]
fn files_that_cannot_be_give_a_code_and_their_path() {
    let world = World::new();
    let told = world.json(
        "const vm = sup.vm(); const thrown = (f) => { try { f() } catch (e) { return [e.name, e.code, e.path] } };
         return [thrown(() => vm.cat('none')), thrown(() => vm.upload('x', 'dir/')), thrown(() => vm.upload('x', '')),
                 thrown(() => vm.download('none').size), thrown(() => [...vm.uploadStreaming('x', 'full').progress()]),
                 thrown(() => sup.file('/nowhere/x'))]",
    );
    assert_eq!(
        told,
        json!([
            ["SupVMFileError", "ENOENT", "/workspace/none"],
            ["SupVMFileError", "EISDIR", "dir/"],
            ["SupVMFileError", "EISDIR", ""],
            ["SupVMFileError", "ENOENT", "/workspace/none"],
            ["SupVMFileError", "ENOSPC", "/workspace/full"],
            ["SupVMFileError", "ENOENT", "/nowhere/x"],
        ])
    );
}

#[test]
fn cat_refuses_what_is_too_large_and_names_download() {
    let world = World::new();
    let error =
        world.error("const vm = sup.vm(); vm.upload('x'.repeat((32 << 20) + 1), 'x'); vm.cat('x')");
    assert!(error.contains("use download"), "{error}");
}

#[test]
fn progress_rises_and_ends_with_a_hundred() {
    let world = World::new();
    let told = world.json(
        "const up = sup.vm().uploadStreaming('x'.repeat(1e5), 'x'); const seen = [...up.progress()];
         return [seen.every((n, i) => Number.isInteger(n) && (i === 0 || n > seen[i - 1])), seen.at(-1), up.wait(), up.path, [...up.progress()]]",
    );
    assert_eq!(told, json!([true, 100, "x", "x", [100]]));
}

#[test]
fn downloads_have_the_class_of_their_content() {
    let world = World::new();
    let told = world.json(
        "const vm = sup.vm(); vm.upload(sup.file(new Uint8Array([137, 80, 78, 71, 13, 10, 26, 10])), 'misnamed.txt'); vm.upload('x', 'a.csv');
         const image = vm.download('misnamed.txt'); const handle = vm.downloadStreaming('/workspace/a.csv'); const file = handle.result;
         return [image instanceof SupImage, image.mimeType, image.filename, image.size, file instanceof SupFile, file.mimeType, file === handle.wait()]",
    );
    assert_eq!(
        told,
        json!([true, "image/png", "misnamed.txt", 8, true, "text/csv", true])
    );
}

#[test]
fn the_end_waits_for_transfers_and_tells_of_failed_ones() {
    let world = World::new();
    let finished = world
        .try_run(
            "const vm = sup.vm(); vm.uploadStreaming('x', 'here'); vm.uploadStreaming('x', 'full')",
        )
        .unwrap();
    assert_eq!(finished.failed_transfers, ["upload to full: no space left"]);
    assert!(
        world
            .memory
            .0
            .lock()
            .unwrap()
            .files
            .contains_key("/workspace/here")
    );
}

#[test]
fn inputs_are_media_and_texts_in_their_order() {
    let mut world = World::new();
    let png = world.file("a.png", b"\x89PNG\r\n\x1a\n");
    let text = world.file("b.txt", b"hello");
    world.inputs.texts = vec!["one".into(), "two".into()];
    world.inputs.images = vec![png];
    world.inputs.files = vec![text.clone()];
    let told = world.json(
        "const { text, texts, image, images, file, video, videos } = sup.input;
         return [text, texts, image instanceof SupImage, images.length, file.filename, file.mimeType, file.size, video === undefined, videos]",
    );
    assert_eq!(
        told,
        json!([
            "one",
            ["one", "two"],
            true,
            1,
            "b.txt",
            "text/plain",
            5,
            true,
            []
        ])
    );
    world.inputs.images = vec![text];
    let error = world.error("return 1");
    assert!(error.contains("is text/plain, not an image"), "{error}");
}

/// A web server on loopback that answers each connection once.
fn serve(status: &'static str, body: &'static [u8]) -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            let mut connection = connection.unwrap();
            let mut request = [0; 4096];
            let _ = connection.read(&mut request);
            let head = format!(
                "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                body.len()
            );
            let _ = connection.write_all(head.as_bytes());
            let _ = connection.write_all(body);
        }
    });
    format!("http://{address}")
}

#[test]
fn a_string_that_is_an_address_is_fetched_and_keeps_its_name() {
    let world = World::new();
    let host = serve("200 OK", b"a,b\n");
    let told = world.json(&format!(
        "const vm = sup.vm(); const media = sup.file('{host}/x.csv');
         return [vm.upload('{host}/data%201.csv?x'), vm.cat('data 1.csv'), vm.upload('{host}/'), vm.upload('see {host}/x'), media.url === '{host}/x.csv', media.filename, media.size]"
    ));
    assert_eq!(
        told,
        json!([
            "data 1.csv",
            "a,b\n",
            "file.txt",
            "file.txt",
            true,
            "x.csv",
            4
        ])
    );
}

#[test]
fn an_answer_that_is_no_success_throws() {
    let world = World::new();
    let host = serve("404 Not Found", b"no");
    let told = world.json(&format!(
        "try {{ sup.vm().upload('{host}/x') }} catch (e) {{ return [e.name, e.code, e.message.includes('404')] }}"
    ));
    assert_eq!(told, json!(["SupVMError", "HTTP_404", true]));
}

#[test]
fn a_chunk_reaches_the_script_while_the_command_still_runs() {
    let mut world = World::new();
    let (go_on, wait) = std::sync::mpsc::channel();
    // The process prints again only once the script has said that it saw the first chunk.
    world.memory.1 = Some(Arc::new(Mutex::new(wait)));
    let seen = Arc::clone(&world.screen);
    let watcher = std::thread::spawn(move || {
        while !String::from_utf8_lossy(&seen.lock().unwrap()).contains("first") {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        go_on.send(()).unwrap();
    });
    let told = world.json(
        "const seen = []; for (const piece of sup.vm().execStreaming('slow').output()) { console.log(piece); seen.push(piece) }
         return seen",
    );
    watcher.join().unwrap();
    assert_eq!(told, json!(["first\n", "second\n"]));
}
