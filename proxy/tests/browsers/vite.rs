//! Vite's server for development, which is particular about the name that it is asked by.

use std::path::PathBuf;
use std::time::Duration;

use crate::browser::Browser;
use crate::house::{House, world};
use crate::programs::Program;

const PAGE: &str = "<title>static</title><script type=module src=/main.js></script>";

/// Counts how often it runs in one page: a page that is loaded anew begins again with nothing.
const MAIN: &str = "import { text } from './part.js'
window.runs = (window.runs ?? 0) + 1
document.title = `${text} in run ${window.runs}`
import.meta.hot.accept('./part.js', (part) => {
  document.title = `${part.text} in run ${window.runs}`
})
";

/// A small application, and Vite at work on it.
struct Application {
    directory: PathBuf,
    _vite: Program,
}

impl Application {
    async fn start(house: &House, allowed: &str, more: &[&str]) -> Self {
        let directory = house.dir().join("application");
        std::fs::create_dir(&directory).unwrap();
        let write = |name: &str, text: &str| {
            std::fs::write(directory.join(name), text).unwrap();
        };
        let settings = format!(
            "export default {{ server: {{ allowedHosts: [{allowed}] }}, cacheDir: 'cache' }}"
        );
        write("vite.config.mjs", &settings);
        write("index.html", PAGE);
        write("main.js", MAIN);
        write("part.js", "export const text = 'first'\n");
        let vite = house.dir().join("node_modules/vite/bin/vite.js");
        let mut words = vec!["node", vite.to_str().unwrap()];
        words.extend(["--port", "3000", "--strictPort"]);
        words.extend(more);
        let mut command = house.inside(&words);
        command.current_dir(&directory);
        Self {
            _vite: house.serve(3000, command, "vite").await,
            directory,
        }
    }

    /// Changes a module, as somebody who works on it.
    fn change(&self, text: &str) {
        let text = format!("export const text = '{text}'\n");
        std::fs::write(self.directory.join("part.js"), text).unwrap();
    }
}

#[test]
fn vites_refusal_of_a_name_that_it_does_not_know_reaches_the_visitor() {
    world(|house| async move {
        let _application = Application::start(&house, "", &["--host"]).await;
        let url = House::url("/");
        let got = house.curl(&["-w", "\n%{http_code}", &url]).await;
        assert!(got.ends_with("\n403"), "{got}");
        let name = House::name();
        let wanted = format!("Blocked request. This host (\"{name}\") is not allowed.");
        assert!(got.contains(&wanted), "{got}");
    });
}

#[test]
fn an_application_that_vite_serves_is_updated_in_the_browser_when_it_changes() {
    world(|house| async move {
        let allowed = format!("'{}'", House::name());
        let application = Application::start(&house, &allowed, &["--host"]).await;
        updates(&house, &application).await;
    });
}

#[test]
fn an_application_that_vite_serves_on_loopback_alone_is_updated_as_well() {
    world(|house| async move {
        let application = Application::start(&house, "'.vm.test'", &[]).await;
        updates(&house, &application).await;
    });
}

async fn updates(house: &House, application: &Application) {
    let module = house.curl(&[&House::url("/part.js")]).await;
    assert!(module.contains("'first'"), "{module}");
    let mut browser = Browser::open(house, &House::url("/")).await;
    // Vite tells only those who listen already.
    let begun = ["first in run 1", "[vite] connected."];
    browser.sees_all(house, &begun).await;
    for change in ["second", "third"] {
        // Still the page that was loaded at first.
        let title = format!("{change} in run 1");
        let mut seen = std::pin::pin!(browser.sees(house, &title));
        loop {
            // Vite does not notice two changes that follow closely on each other.
            application.change(change);
            let pause = Duration::from_secs(1);
            if tokio::time::timeout(pause, seen.as_mut()).await.is_ok() {
                break;
            }
        }
    }
}
