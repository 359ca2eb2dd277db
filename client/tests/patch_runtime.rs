//! Scripts: results, errors, interruption, memory, console and the store. They run within the test,
//! because it chooses what `sup run` has no option for (the limit of memory, the width of the terminal,
//! the user, a second patch's store) and looks at what a script said piece by piece; the few VMs among
//! them are in memory and stand for any.
#![cfg(feature = "patch")]
#![allow(clippy::unwrap_used, missing_docs)]

mod patch_common;

use std::time::Duration;

use client::patch::{PatchError, Scope, Screen, Store};
use patch_common::{Tee, World};
use serde_json::json;

#[test]
fn a_script_returns_at_its_top_or_from_main() {
    let world = World::new();
    assert_eq!(world.text("return 'top'"), "top\n");
    assert_eq!(world.text("function main() { return 'main' }"), "main\n");
    assert_eq!(world.text("const main = () => 'arrow' // end"), "arrow\n");
    assert_eq!(world.text("#!/usr/bin/sup run\nreturn 1 + 1"), "2\n");
    assert_eq!(
        world.text("async function main() { return 'later' }"),
        "later\n"
    );
    assert_eq!(world.text("let a = 1;"), "");
}

#[test]
fn results_are_shown_as_a_person_wants_them() {
    let world = World::new();
    assert_eq!(world.text("return ['a', 2, null, ['b\\n']]"), "a\n2\nb\n");
    assert_eq!(world.text("return { a: 1 }"), "{\n  \"a\": 1\n}\n");
    assert_eq!(
        world.json("return ['a', { b: [true, null] }]"),
        json!(["a", {"b": [true, null]}])
    );
    assert_eq!(
        world.json("const a = {}; a.a = a; return a"),
        json!({"a": "[itself]"})
    );
}

#[test]
fn media_of_a_result_never_leaves_the_directory_nor_overwrites() {
    let world = World::new();
    let png = world.file("x.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR");
    let source = format!("return [sup.image('{png}'), sup.file('{png}')]");
    let shown = world.text(&source);
    let out = world.out();
    let expected = format!(
        "{}\n{}\n",
        out.join("x.png").display(),
        out.join("x-2.png").display()
    );
    assert_eq!(shown, expected);
    assert_eq!(std::fs::read(out.join("x.png")).unwrap().len(), 16);
    let told = world.json(&source);
    assert_eq!(told[0]["mimeType"], "image/png");
    assert_eq!(told[0]["size"], 16);
    assert!(told[0]["path"].as_str().unwrap().ends_with("/x-3.png"));
}

#[test]
fn an_uncaught_error_names_the_line_of_the_script() {
    let world = World::new();
    let error =
        world.error("let a = 1;\nfunction f() {\n  throw new RangeError('too far');\n}\nf();");
    assert!(error.starts_with("RangeError: too far\n"), "{error}");
    assert!(error.contains("patch.js:3"), "{error}");
    assert!(error.contains("patch.js:5"), "{error}");
    assert!(!error.contains("prelude"), "{error}");
    let error = world.error("let a = 1;\nlet = = 2;");
    assert!(
        error.starts_with("SyntaxError: ") && error.contains("patch.js:2"),
        "{error}"
    );
    let error = world.error("sup.vm().exec('fail')");
    assert!(
        error.starts_with("SupVMExecError: Command failed (exit code 3): fail\na\nb"),
        "{error}"
    );
    assert!(
        error.contains("patch.js:1") && !error.contains("prelude"),
        "{error}"
    );
    assert_eq!(world.error("throw { a: 1 }"), "uncaught: {\"a\":1}");
}

#[test]
fn an_interrupt_ends_a_loop_and_a_sleep() {
    for source in [
        "for (;;) {}",
        "sup.sleep(1e9)",
        "for (;;) { try { sup.sleep(1e9) } catch {} }",
    ] {
        let world = World::new();
        let interrupt = world.interrupt.clone();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            interrupt.set();
        });
        assert!(
            matches!(world.try_run(source), Err(PatchError::Interrupted)),
            "{source}"
        );
    }
}

#[test]
fn memory_has_a_limit_and_the_message_says_so() {
    let mut world = World::new();
    world.limit = 32 << 20;
    let error = world.error("const all = []; for (;;) all.push(new Array(1000).fill(1));");
    assert!(error.contains("more than its 32 MiB of memory"), "{error}");
    let error = world.error("function f() { return f() + 1 }\nf()");
    assert!(error.contains("stack"), "{error}");
}

#[test]
fn a_script_has_no_way_to_the_machine() {
    let world = World::new();
    let seen = "return ['std', 'os', 'require', 'process', 'native', 'settings', 'fetch', 'scriptArgs']
        .filter((name) => { try { return eval(`typeof ${name}`) !== 'undefined' } catch { return true } })";
    assert_eq!(world.text(seen), "");
    assert!(world.try_run("return import('os')").is_err());
    assert!(
        world
            .error("new SupVM(Symbol(), 'vm-00000000', '')")
            .contains("cannot be made with new")
    );
}

#[test]
fn console_and_status_print_lines_where_there_is_no_terminal() {
    let world = World::new();
    world.run("console.log('a', 1, { b: [2] }); sup.status('x\\u001b[2J'); sup.status('x\\u001b[2J'); sup.status('y')");
    assert_eq!(world.said(), "a 1 {\"b\":[2]}\nx[2J\ny\n");
}

#[test]
fn the_status_is_one_line_redrawn_on_a_terminal_and_gone_at_the_end() {
    let world = World::new();
    let screen = Screen::terminal(Box::new(Tee(world.screen.clone())), 6);
    world
        .run_on(
            "sup.status('first'); sup.status('a\\nsecond\\n'); console.log('log')",
            screen,
        )
        .unwrap();
    let clear = "\r\u{1b}[2K";
    assert_eq!(
        world.said(),
        format!("{clear}first{clear}secon{clear}log\nsecon{clear}")
    );
}

#[test]
fn values_are_there_in_the_next_run_and_missing_ones_are_null() {
    let world = World::new();
    world.run("sup.global.set('a', { n: [1, NaN, null], d: new Date(5), big: 12n, u: undefined }); sup.set('b', 'chat'); sup.user.set('c', 3)");
    let read = "const a = sup.global.get('a');
        return [a.n[0], Number.isNaN(a.n[1]), a.n[2] === null, a.d.getTime(), a.big === 12n, 'u' in a,
                sup.get('b'), sup.chat.get('b'), sup.user.get('c'), sup.global.get('none') === null]";
    assert_eq!(
        world.json(read),
        json!([1, true, true, 5, true, false, "chat", "chat", 3, true])
    );
    assert_eq!(
        world.json("return [sup.global.keys(), sup.chat.keys(), sup.user.keys()]"),
        json!([["a"], ["b"], ["c"]])
    );
    world.run("sup.global.set('a', undefined); sup.global.set('never', undefined)");
    assert_eq!(
        world.json("return [sup.global.get('a'), sup.global.keys()]"),
        json!([null, []])
    );
}

#[test]
fn chats_see_only_their_own_values() {
    let mut world = World::new();
    world.chat = "one".into();
    world.run("sup.set('k', sup.chat.id)");
    world.chat = "two".into();
    assert_eq!(
        world.json("return [sup.chat.id, sup.get('k')]"),
        json!(["two", null])
    );
}

#[test]
fn objects_of_sup_come_back_alive_wherever_they_were_nested() {
    let world = World::new();
    let png = world.file("p.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR");
    world.run(&format!(
        "const vm = sup.vm(); const s = vm.session(); s.cd('app'); s.setEnv('A', '1'); s.setEnv('B', null);
         const h = vm.execStreaming('mixed');
         sup.global.set('all', {{ list: [vm, {{ s }}], h, m: sup.image('{png}') }})"
    ));
    std::fs::remove_file(&png).unwrap();
    let told = world.json(
        "const { list: [vm, { s }], h, m } = sup.global.get('all');
         vm.upload(m);
         return [vm instanceof SupVM, vm.id, vm.url, s instanceof SupVMSession, s.cwd, s.env,
                 h instanceof SupVMStreamHandle, h.block(), m instanceof SupImage, m.filename, m.size, s.exec('x')]",
    );
    assert_eq!(
        told,
        json!([true, "vm-11111111", "https://11111111.example", true, "/workspace/app", {"A": "1"},
               true, "one\ntwo\nthree\n", true, "p.png", 16, "x\n"])
    );
    let recorded = world.memory.0.lock().unwrap();
    assert_eq!(recorded.files["/workspace/image.png"].len(), 16);
    let env = &recorded.commands.last().unwrap().1.env;
    assert_eq!(*env, [("A".into(), Some("1".into())), ("B".into(), None)]);
}

#[test]
fn a_user_object_that_looks_like_ours_stays_what_it_is() {
    let world = World::new();
    world.run("sup.set('k', [{ $sup: 'vm', id: 'vm-00000000', url: 'x' }, { $sup: 'object', entries: [] }, { ['__proto__']: 1 }])");
    let read = "const [a, b, c] = sup.get('k');
        return [a instanceof SupVM, a, b, Object.keys(c)]";
    assert_eq!(
        world.json(read),
        json!([false, {"$sup": "vm", "id": "vm-00000000", "url": "x"}, {"$sup": "object", "entries": []}, ["__proto__"]])
    );
}

#[test]
fn what_cannot_be_stored_is_refused_with_its_place() {
    let world = World::new();
    assert!(
        world
            .error("sup.set('k', { a: [() => 1] })")
            .contains("TypeError: k.a[0] is a function")
    );
    assert!(
        world
            .error("const a = []; a.push(a); sup.set('k', a)")
            .contains("k[0] contains itself")
    );
    assert!(
        world
            .error("sup.get(1)")
            .contains("a key is a string, not number")
    );
    assert!(
        world
            .error("sup.set('k', 'x'.repeat(17 << 20))")
            .contains("the largest is 16777216 bytes")
    );
}

#[test]
fn two_patches_at_once_lose_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let threads: Vec<_> = (0..2)
        .map(|writer| {
            let path = directory.path().to_owned();
            std::thread::spawn(move || {
                let store = Store::open(&path, "p").unwrap();
                for number in 0..50 {
                    store
                        .set(&Scope::Global, &format!("{writer}-{number}"), "1")
                        .unwrap();
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    let store = Store::open(directory.path(), "p").unwrap();
    assert_eq!(store.keys(&Scope::Global).unwrap().len(), 100);
    let other = Store::open(directory.path(), "q").unwrap();
    assert!(other.keys(&Scope::Global).unwrap().is_empty());
}

#[test]
fn what_a_vm_says_cannot_drive_the_terminal() {
    let world = World::new();
    world.run("console.log('a\\tb\\x1b[2J\\x9b1mc'); sup.status('d\\x1b]0;e\\x07')");
    let said = String::from_utf8(world.screen.lock().unwrap().clone()).unwrap();
    assert_eq!(said, "a\tb[2J1mc\nd]0;e\n");
}

#[test]
fn work_that_nobody_waits_for_is_done_and_an_endless_one_can_be_interrupted() {
    let world = World::new();
    world.run("async function f() { await 0; await 0; sup.global.set('done', 1) } f(); return 1");
    assert_eq!(world.json("return sup.global.get('done')"), 1);
    for script in [
        "(async () => { for (;;) await 0 })(); return 1",
        "return (async () => { for (;;) await 0 })()",
    ] {
        let world = World::new();
        let interrupt = world.interrupt.clone();
        let later = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            interrupt.set();
        });
        assert!(matches!(
            world.try_run(script),
            Err(PatchError::Interrupted)
        ));
        later.join().unwrap();
    }
}

#[test]
fn a_script_that_replaces_built_ins_makes_no_vms_of_its_own() {
    let world = World::new();
    let told = world.json(
        "sup.global.set('k', 1); const real = JSON.parse;
         JSON.parse = () => ({ $sup: 'vm', id: 'vm-00000000', url: 'x' });
         const got = sup.global.get('k'); JSON.parse = real;
         const refused = (f) => { try { f(); return false } catch { return true } };
         return [got, refused(() => Object.setPrototypeOf(SupImage, class { constructor(key) { sup.key = key } })),
           refused(() => Object.defineProperty(SupVM, Symbol.hasInstance, { value: () => true }))]",
    );
    assert_eq!(told, serde_json::json!([1, true, true]));
}

#[test]
fn halves_of_characters_and_endless_depth_do_no_harm() {
    let world = World::new();
    assert_eq!(
        world.text("sup.status('😀'.slice(0, 1)); return '😀'.slice(1)"),
        "\u{fffd}\n"
    );
    assert_eq!(
        world.json("return sup.vm().exec('echo ' + '😀'.slice(0, 1))"),
        "echo \u{fffd}\n"
    );
    let deep =
        world.json("let deep = 'end'; for (let i = 0; i < 500; i += 1) deep = [deep]; return deep");
    assert!(deep.to_string().contains("too deep"));
}
