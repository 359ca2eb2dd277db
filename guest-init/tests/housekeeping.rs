//! Health, the clock, and connections into the machine.

#![allow(clippy::unwrap_used)]

mod common;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};

use common::files::{ask, noise, refusal};
use common::{Agent, Client, eventually, shell};
use protocol::agent::{AGENT_PORT, Dial, Dialed, Health, HealthReport, SetTime};
use protocol::{ErrorCode, Kind, message};

fn dial(agent: &Agent, port: u16) -> Client {
    let mut client = agent.connect();
    client.send(&Dial { port });
    message::decode::<Dialed>(&client.frame().expect("an answer"))
        .unwrap_or_else(|error| panic!("{error}"));
    client
}

fn server() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

#[test]
fn health_is_what_the_kernel_says() {
    let agent = Agent::start();
    let mut sleeping = agent.connect();
    sleeping.send(&shell("sleep 600"));
    let pid = sleeping.started().pid;
    let report: HealthReport = ask(&agent, &Health {});
    let said = |file: &str, word: usize| {
        let text = std::fs::read_to_string(file).unwrap();
        text.split_ascii_whitespace().nth(word).unwrap().to_owned()
    };
    let uptime: f64 = said("/proc/uptime", 0).parse().unwrap();
    assert!((report.uptime_ms as f64 / 1000.0 - uptime).abs() < 60.0);
    assert_eq!(
        report.memory_bytes,
        said("/proc/meminfo", 1).parse::<u64>().unwrap() * 1024
    );
    assert!(report.memory_available_bytes > 0);
    assert!(report.memory_available_bytes < report.memory_bytes);
    assert!(report.disk_available_bytes > 0 && report.disk_available_bytes < report.disk_bytes);
    assert!(report.disk_free_files > 0);
    assert!(report.processes >= 3, "{} processes", report.processes);
    assert!(report.agent_bytes > 500 << 10 && report.agent_bytes < 16 << 20);
    assert_eq!(report.streams, 2, "the command's and this one");
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    assert!((now.as_nanos() as i128 - i128::from(report.unix_ns)).abs() < 60_000_000_000);
    agent.shell(&format!("kill -9 -{pid}"));
}

#[test]
fn the_clock_of_a_borrowed_machine_is_left_alone() {
    let agent = Agent::start();
    let error = refusal(&agent, &SetTime { unix_ns: 1 });
    assert_eq!(error.code, ErrorCode::InvalidArgument);
    let report: HealthReport = ask(&agent, &Health {});
    assert!(report.unix_ns > 1_700_000_000_000_000_000);
}

#[test]
fn nothing_is_answered_before_the_configuration() {
    let agent = Agent::start_unconfigured(&[], None);
    assert_eq!(refusal(&agent, &Health {}).code, ErrorCode::NotConfigured);
    assert_eq!(
        refusal(&agent, &Dial { port: 80 }).code,
        ErrorCode::NotConfigured
    );
}

#[test]
fn a_dialed_port_carries_bytes_both_ways_and_each_end_by_itself() {
    let agent = Agent::start();
    let (listener, port) = server();
    let sent = noise(3_000_000);
    let echo = std::thread::spawn(move || {
        let (mut connection, _) = listener.accept().unwrap();
        // Answers only when all of it has come, which the half-close says.
        let mut bytes = Vec::new();
        connection.read_to_end(&mut bytes).unwrap();
        bytes.reverse();
        connection.write_all(&bytes).unwrap();
    });
    let mut client = dial(&agent, port);
    client.socket.write_all(&sent).unwrap();
    client.socket.shutdown(Shutdown::Write).unwrap();
    let mut got = Vec::new();
    client.socket.read_to_end(&mut got).unwrap();
    got.reverse();
    assert!(got == sent, "{} bytes came back", got.len());
    echo.join().unwrap();
}

#[test]
fn a_server_that_says_no_more_still_hears() {
    let agent = Agent::start();
    let (listener, port) = server();
    let hears = std::thread::spawn(move || {
        let (mut connection, _) = listener.accept().unwrap();
        connection.write_all(b"go on").unwrap();
        connection.shutdown(Shutdown::Write).unwrap();
        let mut bytes = Vec::new();
        connection.read_to_end(&mut bytes).unwrap();
        bytes
    });
    let mut client = dial(&agent, port);
    assert_eq!(client.rest(), b"go on");
    client.socket.write_all(&[7; 500_000]).unwrap();
    drop(client);
    assert_eq!(hears.join().unwrap().len(), 500_000);
}

#[test]
fn a_server_on_ipv6_only_is_reached_too() {
    let agent = Agent::start();
    let listener = TcpListener::bind("[::1]:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let _client = dial(&agent, port);
    assert!(listener.accept().is_ok());
}

#[test]
fn a_port_that_nobody_listens_on_is_refused_by_name() {
    let agent = Agent::start();
    let (listener, port) = server();
    drop(listener);
    let error = refusal(&agent, &Dial { port });
    assert_eq!(error.code, ErrorCode::ConnectionRefused);
    assert!(
        error.message.contains(&port.to_string()),
        "{}",
        error.message
    );
    assert_eq!(error.detail, "127.0.0.1: ECONNREFUSED\n::1: ECONNREFUSED");
}

#[test]
fn the_agents_own_port_is_never_dialed() {
    let agent = Agent::start();
    for port in [0, u16::try_from(AGENT_PORT).unwrap()] {
        let error = refusal(&agent, &Dial { port });
        assert_eq!(error.code, ErrorCode::InvalidArgument, "{port}");
    }
}

#[test]
fn bytes_before_the_answer_are_refused_instead_of_lost() {
    let agent = Agent::start();
    let (_listener, port) = server();
    let mut bytes = message::encode(&Dial { port }).unwrap();
    bytes.extend_from_slice(b"GET");
    let mut client = agent.connect();
    client.socket.write_all(&bytes).unwrap();
    assert_eq!(client.error().code, ErrorCode::InvalidArgument);
}

#[test]
fn a_connection_that_nobody_reads_costs_two_buffers_and_holds_up_nobody() {
    let agent = Agent::start();
    let (listener, port) = server();
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            let mut connection = connection.unwrap();
            std::thread::spawn(move || while connection.write_all(&[0; 65_536]).is_ok() {});
        }
    });
    let stuck: Vec<_> = (0..20).map(|_| dial(&agent, port)).collect();
    assert_eq!(agent.shell("echo on").text(), "on\n");
    let peak = agent.status_kib("VmHWM:");
    assert!(peak < 16 << 10, "{peak} KiB");
    let before = agent.descriptors();
    drop(stuck);
    eventually("the connections have ended", || {
        agent.descriptors() <= before - 40
    });
}

#[test]
fn a_client_that_goes_ends_the_connection_and_a_server_that_goes_ends_the_stream() {
    let agent = Agent::start();
    let (listener, port) = server();
    let client = dial(&agent, port);
    let (mut connection, _) = listener.accept().unwrap();
    drop(client);
    assert_eq!(connection.read(&mut [0; 10]).unwrap(), 0);
    drop(connection);
    let mut client = dial(&agent, port);
    let (connection, _): (TcpStream, _) = listener.accept().unwrap();
    drop(connection);
    assert_eq!(client.socket.read(&mut [0; 10]).unwrap(), 0);
    assert_eq!(agent.connect().socket.write(&[]).unwrap(), 0);
}

#[test]
fn a_malformed_request_is_refused_by_name() {
    let agent = Agent::start();
    for kind in [Kind::HEALTH, Kind::SET_TIME, Kind::DIAL] {
        let mut client = agent.connect();
        client.send_raw(kind, &[0xff; 12]);
        assert_eq!(client.error().code, ErrorCode::Malformed);
        assert_eq!(client.frame(), None);
    }
}

#[test]
fn what_a_client_sent_before_it_went_reaches_a_slow_server() {
    let agent = Agent::start();
    let (listener, port) = server();
    let client = dial(&agent, port);
    let (mut connection, _) = listener.accept().unwrap();
    let sender = std::thread::spawn(move || {
        let mut client = client;
        client.socket.write_all(&[7; 20_000_000]).unwrap();
    });
    // The server begins when its own queue is full.
    std::thread::sleep(std::time::Duration::from_millis(300));
    let mut bytes = Vec::new();
    connection.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len(), 20_000_000);
    sender.join().unwrap();
}
