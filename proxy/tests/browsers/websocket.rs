//! WebSockets between a Node server and a Node client, both with the `ws` package.

use crate::house::{House, world};

#[test]
fn websockets_of_node_carry_all_messages_and_closes_and_may_be_quiet() {
    world(|house| async move {
        let server = house.node(&["echo.mjs"]);
        let _server = house
            .serve(3000, house.inside(&server.words()), "echo")
            .await;
        let root = house.root();
        let client = house.node(&["talk.mjs", &House::name(), root.to_str().unwrap()]);
        let said = crate::programs::run(house.outside(&client.words())).await;
        let said = String::from_utf8(said).unwrap();
        assert!(said.ends_with("all well\n"), "{said}");
    });
}
