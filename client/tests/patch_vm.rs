//! Failures that the native appliance (`patch_native.rs`) cannot be brought to: its agent is an honest
//! one that neither breaks the protocol nor refuses what a script can ask for. What they mean to a
//! script is checked with a backend in memory; everything else about VMs is tested natively.
#![cfg(feature = "patch")]
#![allow(clippy::unwrap_used, missing_docs)]

mod patch_common;

use patch_common::World;
use serde_json::json;

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
