//! What scripts take in and give out: files both ways, media, addresses on the web.

use std::io::Read;
use std::net::TcpListener;

use super::*;

#[test]
fn files_go_in_and_out_with_their_types_and_errors_have_code_and_path() {
    let world = World::new();
    let told = world.told(
        "const up = vm.uploadStreaming('x'.repeat(3e6), 'deep/down/x'); const seen = [...up.progress()];
         vm.exec('mkdir dir; head -c 1000 /dev/urandom > random');
         const rises = (list) => list.every((n, i) => Number.isInteger(n) && (i === 0 || n >= list[i - 1])) && list.at(-1) === 100;
         const down = vm.downloadStreaming('deep/down/x'); const going = [...down.progress()];
         const random = vm.download('/workspace/random'); vm.upload(random, 'again');
         return [up.path, rises(seen), vm.exec('wc -c < deep/down/x').trim(), rises(going), down.result.size, down.wait() === down.result,
           random instanceof SupFile, vm.exec('cmp random again && stat -c %a again'), vm.upload('text'), vm.cat('file.txt'),
           thrown(() => vm.cat('none')), thrown(() => vm.download('dir')), thrown(() => vm.upload('x', 'dir')), thrown(() => vm.cat('file.txt/x'))]",
    );
    assert_eq!(
        told,
        json!([
            "deep/down/x",
            true,
            "3000000",
            true,
            3_000_000,
            true,
            true,
            "644\n",
            "file.txt",
            "text",
            ["SupVMFileError", "ENOENT", "/workspace/none"],
            ["SupVMFileError", "EISDIR", "/workspace/dir"],
            ["SupVMFileError", "EISDIR", "/workspace/dir"],
            ["SupVMFileError", "ENOTDIR", "/workspace/file.txt/x"],
        ])
    );
}

#[test]
fn inputs_become_files_of_the_vm_and_media_of_the_result_files_here() {
    let world = World::new();
    let image = world.file("a.png", PNG);
    let (code, out, said) = world.run(
        "const vm = sup.vm(); sup.status('working');
         const path = vm.upload(sup.input.image); const copy = vm.download(path); vm.delete();
         return [sup.input.text, sup.input.texts.length, sup.chat.id, path, copy instanceof SupImage, copy]",
        &[
            "--text", "one", "--text", "two", "--image", image.to_str().unwrap(), "--chat", "c7",
            "--out", "made",
        ],
    );
    assert_eq!(
        (code, out.as_str()),
        (0, "one\n2\nc7\nimage.png\ntrue\nmade/image.png\n"),
        "{said}"
    );
    assert_eq!(said, "working\n");
    assert_eq!(
        std::fs::read(world.home.path().join("made/image.png")).unwrap(),
        PNG
    );
}

#[test]
fn sounds_and_films_come_out_as_what_they_are_and_values_of_the_user_stay() {
    let world = World::new();
    let told = world.told(
        "vm.exec(\"printf 'RIFF\\\\044\\\\0\\\\0\\\\0WAVEfmt ' > a; printf '\\\\0\\\\0\\\\0\\\\030ftypisom\\\\0\\\\0\\\\2\\\\0isomiso2' > b\");
         const [a, b] = [vm.download('a'), vm.downloadStreaming('b').result];
         sup.user.set('n', { deep: [1n, NaN] });
         return [a instanceof SupAudio, b instanceof SupVideo, b.mimeType, String(sup.user.get('n').deep), sup.user.keys()]",
    );
    assert_eq!(told, json!([true, true, "video/mp4", "1,NaN", ["n"]]));
    assert_eq!(
        world.json("return sup.user.keys().concat(sup.chat.keys(), sup.global.keys())"),
        json!(["n"])
    );
}

#[test]
fn an_upload_goes_on_after_a_lost_connection_whatever_its_source() {
    let world = World::new();
    let (url, fetches) = serves(LONG);
    let near = world.home.path().join("wire");
    let wire = Wire::new(&near, world.appliance.unix());
    let script = "const vm = sup.vm(); sup.status('go');
         const path = vm.upload(sup.input.text.startsWith('http') ? sup.input.text : sup.input.text.repeat(1e6), 'long');
         const handle = vm.uploadStreaming('short', 'next'); const seen = [...handle.progress()];
         const told = [path, vm.exec('sha256sum < long; ls -A | wc -l'), seen.at(-1)];
         vm.delete(); return told";
    let text = "0123456789";
    for (input, length, first) in [(text, LONG, b'0'), (url.as_str(), LONG, b'x')] {
        // Of the bytes so many pass: it breaks in the middle of the long one.
        wire.cut_behind(LONG / 2);
        let mut command = world.sup(script, &["--json", "--text", input]);
        let endpoint = format!("unix:{}", near.display());
        let done = command.env("SUP_ENDPOINT", endpoint).output().unwrap();
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert_eq!(said, "go\n");
        assert!(wire.was_cut(), "nothing was lost");
        let content = match first {
            b'x' => vec![b'x'; length],
            _ => text.repeat(length / 10).into_bytes(),
        };
        let told: Value = serde_json::from_slice(&done.stdout).unwrap();
        let sum = sha256(&content);
        // Two files, and nothing that is hidden.
        assert_eq!(told, json!(["long", format!("{sum}  -\n2\n"), 100]));
    }
    assert_eq!(fetches.try_iter().count(), 2, "the server was asked again");
}

fn sha256(bytes: &[u8]) -> String {
    let mut child = Command::new("sha256sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    let done = child.wait_with_output().unwrap();
    String::from_utf8(done.stdout).unwrap()[..64].to_owned()
}

#[test]
fn what_is_longer_than_any_fetch_may_be_is_refused_before_it_comes() {
    let world = World::new();
    let (url, _) = stalls("HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n");
    let told = world.json(&format!(
        "try {{ sup.file('{url}') }} catch (e) {{ return [e.name, e.code] }}"
    ));
    assert_eq!(told, json!(["SupVMError", "TOO_LARGE"]));
}

#[test]
fn uploads_are_named_by_type_and_downloads_have_the_class_of_their_content() {
    let world = World::new();
    let png = world.file("photo.jpg", PNG);
    let told = world.told(&format!(
        "const paths = [vm.upload(sup.image('{}')), vm.upload('text'), vm.upload('{{\"a\":1}}'), vm.upload('x', 'a/b.js'), vm.upload('y', '/tmp/z'),
                 vm.upload(sup.file(new Uint8Array([0, 1, 2])))];
         vm.exec('cp image.png misnamed.txt'); const image = vm.download('misnamed.txt');
         vm.upload('x', 'a.csv'); const file = vm.download('/workspace/a.csv');
         return [paths, vm.exec('ls'), vm.cat('a/b.js') + vm.cat('/tmp/z'),
           image instanceof SupImage, image.mimeType, image.filename, image.size, file instanceof SupFile, file.mimeType]",
        png.display()
    ));
    assert_eq!(
        told,
        json!([
            [
                "image.png",
                "file.txt",
                "file.json",
                "a/b.js",
                "/tmp/z",
                "file.bin"
            ],
            "a\na.csv\nfile.bin\nfile.json\nfile.txt\nimage.png\nmisnamed.txt\n",
            "xy",
            true,
            "image/png",
            "misnamed.txt",
            PNG.len(),
            true,
            "text/csv"
        ])
    );
}

#[test]
fn files_that_cannot_be_give_a_code_and_their_path() {
    let world = World::new();
    let told = world.told(
        "vm.exec('mkdir dir; head -c 33554433 /dev/zero > big');
         return [thrown(() => vm.upload('x', 'dir/')), thrown(() => vm.upload('x', '')), thrown(() => vm.download('none').size),
                 thrown(() => [...vm.uploadStreaming('x', 'dir').progress()]), thrown(() => sup.file('/nowhere/x')), thrown(() => vm.cat('big'))]",
    );
    let error = |code: &str, path: &str| json!(["SupVMFileError", code, path]);
    assert_eq!(
        told,
        json!([
            error("EISDIR", "dir/"),
            error("EISDIR", ""),
            error("ENOENT", "/workspace/none"),
            error("EISDIR", "/workspace/dir"),
            error("ENOENT", "/nowhere/x"),
            error("EFBIG", "big"),
        ])
    );
}

#[test]
fn the_end_waits_for_transfers_and_tells_of_failed_ones() {
    let world = World::new();
    let (code, out, said) = world.run(
        "const vm = sup.vm(); vm.exec('mkdir dir'); sup.global.set('vm', vm);
         vm.uploadStreaming('x'.repeat(3e6), 'here'); vm.uploadStreaming('x', 'dir')",
        &[],
    );
    assert_eq!((code, out.as_str()), (1, ""), "{said}");
    assert!(said.contains("upload to dir"), "{said}");
    let size = world.json("const vm = sup.global.get('vm'); const size = vm.exec('wc -c < here'); vm.delete(); return size");
    assert_eq!(size, json!("3000000\n"));
}

#[test]
fn inputs_are_media_and_texts_in_their_order() {
    let world = World::new();
    let image = world.file("a.png", PNG).display().to_string();
    let text = world.file("b.txt", "hello").display().to_string();
    let (code, out, said) = world.run(
        "const { text, texts, image, images, file, video, videos } = sup.input;
         return [text, texts, image instanceof SupImage, images.length, file.filename, file.mimeType, file.size, video === undefined, videos]",
        &["--json", "--text", "one", "--text", "two", "--image", &image, "--file", &text],
    );
    assert_eq!(code, 0, "{said}");
    let told: Value = serde_json::from_str(&out).unwrap();
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
    let (code, _, said) = world.run("return 1", &["--image", &text]);
    assert_eq!(code, 1);
    assert!(said.contains("is text/plain, not an image"), "{said}");
}

#[test]
fn sounds_and_films_are_inputs_too_and_are_made_of_bytes_or_files_of_their_kind_alone() {
    let world = World::new();
    let sound = b"RIFF\x24\0\0\0WAVEfmt ";
    let film = b"\0\0\0\x18ftypisom\0\0\x02\0isomiso2";
    let sound = world.file("a.wav", sound).display().to_string();
    let film = world.file("b.mp4", film).display().to_string();
    let (code, out, said) = world.run(
        "const { audio, audios, video, videos } = sup.input;
         const kinds = (all) => all.map((one) => [one.constructor.name, one.filename, one.mimeType]);
         const bytes = [0x52, 0x49, 0x46, 0x46, 36, 0, 0, 0, 0x57, 0x41, 0x56, 0x45, 0x66, 0x6d, 0x74, 0x20];
         const made = kinds([audio, video, sup.audio(audio), sup.video(video), sup.audio(bytes), sup.file(video)]);
         const refused = [() => sup.audio(video), () => sup.video(audio), () => sup.video(bytes)]
           .map((make) => { try { make(); return 'made' } catch (error) { return error.message } });
         return { made, counts: [audios.length, videos.length], refused }",
        &["--json", "--audio", &sound, "--audio", &sound, "--video", &film],
    );
    assert_eq!(code, 0, "{said}");
    let told: Value = serde_json::from_str(&out).unwrap();
    let (wav, mp4) = ("audio/x-wav", "video/mp4");
    assert_eq!(
        told["made"],
        json!([
            ["SupAudio", "a.wav", wav],
            ["SupVideo", "b.mp4", mp4],
            ["SupAudio", "a.wav", wav],
            ["SupVideo", "b.mp4", mp4],
            ["SupAudio", "audio.wav", wav],
            ["SupFile", "b.mp4", mp4],
        ])
    );
    assert_eq!(told["counts"], json!([2, 1]));
    let refused = told["refused"].as_array().unwrap();
    for (refused, kind) in refused.iter().zip([mp4, wav, wav]) {
        assert!(refused.as_str().unwrap().contains(kind), "{refused}");
    }
}

#[test]
fn one_transfer_too_many_is_refused_and_the_others_arrive() {
    let world = World::new();
    // Answers nobody until somebody asks while 32 wait.
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", server.local_addr().unwrap());
    std::thread::spawn(move || {
        let waiting: Vec<_> = server.incoming().take(33).collect();
        for stream in waiting {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 4096]).unwrap();
            stream
                .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nConnection: close\r\n\r\nx")
                .unwrap();
        }
    });
    let told = world.told(&format!(
        "const under = []; for (let i = 0; i < 32; i += 1) under.push(vm.uploadStreaming('{address}/f', `f${{i}}`));
         const refused = thrown(() => vm.uploadStreaming('x', 'more'));
         sup.file('{address}/go');
         for (const one of under) one.wait();
         return [refused[1], vm.exec('cat f* | wc -c').trim(), vm.uploadStreaming('x', 'more').path]"
    ));
    assert_eq!(told, json!(["TOO_MANY_TRANSFERS", "32", "more"]));
}

#[test]
fn a_string_that_is_an_address_is_fetched_and_keeps_its_name_unless_it_is_refused() {
    let world = World::new();
    let (host, none) = (answers("200 OK", "a,b\n"), answers("404 Not Found", "no"));
    let told = world.told(&format!(
        "const media = sup.file('{host}/x.csv');
         return [vm.upload('{host}/data%201.csv?x'), vm.cat('data 1.csv'), vm.upload('{host}/'), vm.cat('file.txt'), vm.upload('see {host}/x'),
           media.url === '{host}/x.csv', media.filename, media.size, thrown(() => vm.upload('{none}/x'))]"
    ));
    assert_eq!(
        told,
        json!([
            "data 1.csv",
            "a,b\n",
            "file.txt",
            "a,b\n",
            "file.txt",
            true,
            "x.csv",
            4,
            ["SupVMError", "HTTP_404", null]
        ])
    );
}
