use proptest::prelude::*;

use super::*;

const WEB: (RuleProtocol, u16) = (RuleProtocol::Tcp, 443);

fn rule(action: RuleAction, to: &str) -> Rule {
    Rule {
        action,
        to: to.parse().unwrap(),
        protocol: RuleProtocol::Any,
        ports: (0, u16::MAX),
    }
}

fn allow(to: &str) -> Rule {
    rule(RuleAction::Allow, to)
}

fn deny(to: &str) -> Rule {
    rule(RuleAction::Deny, to)
}

fn policy(operator: &[Rule], own: &[Rule]) -> Policy {
    let egress = Egress {
        rules: own.to_vec(),
        ..Egress::default()
    };
    Policy::new(operator.to_vec(), egress, Arc::default())
}

fn name(text: &str) -> DomainName {
    text.parse().unwrap()
}

fn opens(policy: &Policy, address: &str) -> bool {
    policy.decide(WEB.0, address.parse().unwrap(), WEB.1) == Verdict::Allow
}

fn asks(policy: &Policy, text: &str) -> bool {
    policy.may_ask(Some(&name(text))) == Verdict::Allow
}

fn pin(policy: &Policy, asked: &str, address: &str) {
    policy.pin(
        &name(asked),
        &[(address.parse().unwrap(), Duration::from_secs(300))],
    );
}

#[test]
fn without_rules_the_public_internet_is_open_and_all_else_closed() {
    let policy = policy(&[], &[]);
    for address in ["8.8.8.8", "2606:4700::1111", "64:ff9b::8.8.8.8"] {
        assert!(opens(&policy, address), "{address}");
    }
    for address in [
        "10.0.0.1",
        "169.254.169.254",
        "fd00:ec2::254",
        "127.0.0.1",
        "::1",
        "::ffff:192.168.0.1",
        "64:ff9b::192.168.0.1",
        "fe80::1",
        "2002:808:808::1",
    ] {
        assert!(!opens(&policy, address), "{address}");
    }
    assert!(asks(&policy, "example.org"));
    assert_eq!(policy.may_ask(None), Verdict::Allow);
}

#[test]
fn no_rule_opens_loopback_multicast_broadcast_or_the_gateways_networks() {
    let everything = [allow("*"), allow("0.0.0.0/0"), allow("::/0")];
    let policy = policy(&everything, &everything);
    for address in [
        "0.0.0.0",
        "127.0.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "10.213.0.1",
        "10.213.0.77",
        "::",
        "::1",
        "::127.0.0.1",
        "::ffff:127.0.0.1",
        "64:ff9b::127.0.0.1",
        "2002:7f00:1::1",
        "2001::1",
        "ff02::1",
        "fd73:7570::1",
    ] {
        assert!(!opens(&policy, address), "{address}");
    }
    for address in ["10.0.0.1", "169.254.169.254", "fd00::1", "8.8.8.8"] {
        assert!(opens(&policy, address), "{address}");
    }
}

#[test]
fn the_first_matching_rule_decides_and_the_operators_come_first() {
    let operator = [deny("10.1.0.0/16"), allow("10.0.0.0/8")];
    let own = [allow("10.1.2.3"), deny("10.2.0.0/16"), deny("8.8.8.8")];
    let policy = policy(&operator, &own);
    assert!(!opens(&policy, "10.1.2.3"));
    assert!(opens(&policy, "10.2.0.1"));
    assert!(!opens(&policy, "8.8.8.8"));
    policy.set_operator(vec![]);
    assert!(opens(&policy, "10.1.2.3"));
    assert!(!opens(&policy, "10.2.0.1"));
    policy.update(Egress::default());
    assert!(!opens(&policy, "10.1.2.3"));
    assert!(opens(&policy, "8.8.8.8"));
}

#[test]
fn a_rule_is_about_its_protocol_and_ports_alone() {
    let web = Rule {
        protocol: RuleProtocol::Tcp,
        ports: (80, 443),
        ..allow("10.0.0.0/8")
    };
    let policy = policy(&[], &[web, deny("9.9.9.9")]);
    let decide = |protocol, address: &str, port| {
        policy.decide(protocol, address.parse().unwrap(), port) == Verdict::Allow
    };
    for (port, expected) in [(79, false), (80, true), (443, true), (444, false)] {
        assert_eq!(decide(RuleProtocol::Tcp, "10.0.0.1", port), expected);
    }
    assert!(!decide(RuleProtocol::Udp, "10.0.0.1", 80));
    assert!(!decide(RuleProtocol::Icmp, "10.0.0.1", 80));
    assert!(!decide(RuleProtocol::Icmp, "9.9.9.9", 0));
    let backwards = Rule {
        ports: (443, 80),
        ..allow("10.0.0.0/8")
    };
    let ping = Rule {
        protocol: RuleProtocol::Icmp,
        ..allow("172.16.0.1")
    };
    policy.update(Egress {
        rules: vec![backwards, ping],
        ..Egress::default()
    });
    let decide = |protocol, address: &str, port| {
        policy.decide(protocol, address.parse().unwrap(), port) == Verdict::Allow
    };
    assert!(!decide(RuleProtocol::Tcp, "10.0.0.1", 80));
    assert!(decide(RuleProtocol::Icmp, "172.16.0.1", 9));
    assert!(!decide(RuleProtocol::Tcp, "172.16.0.1", 9));
}

#[test]
fn what_this_build_does_not_understand_closes_and_never_opens() {
    let newer = |to: &str, action| Rule {
        protocol: RuleProtocol::Other(9),
        ..rule(action, to)
    };
    let policy = policy(
        &[],
        &[
            newer("10.0.0.1", RuleAction::Allow),
            newer("8.8.8.8", RuleAction::Deny),
            rule(RuleAction::Other(7), "9.9.9.9"),
        ],
    );
    assert!(!opens(&policy, "10.0.0.1"));
    assert!(!opens(&policy, "8.8.8.8"));
    assert!(!opens(&policy, "9.9.9.9"));
    assert!(opens(&policy, "1.1.1.1"));
}

#[test]
fn offline_closes_everything_names_included() {
    let policy = policy(&[allow("*")], &[allow("*"), allow("example.org")]);
    assert!(!policy.offline() && opens(&policy, "8.8.8.8"));
    policy.update(Egress {
        offline: true,
        rules: vec![allow("*")],
        ..Egress::default()
    });
    pin(&policy, "example.org", "8.8.8.8");
    assert!(policy.offline());
    assert!(!opens(&policy, "8.8.8.8"));
    assert!(!asks(&policy, "example.org"));
    assert_eq!(policy.may_ask(None), Verdict::Deny);
}

#[test]
fn the_hosts_own_addresses_are_closed_unless_a_rule_for_them_opens_them() {
    let host = Arc::new(HostAddresses::new(["8.8.8.8".parse().unwrap()]));
    let policy = Policy::new(vec![], Egress::default(), Arc::clone(&host));
    assert!(!opens(&policy, "8.8.8.8"));
    assert!(!opens(&policy, "::ffff:8.8.8.8"));
    assert!(!opens(&policy, "64:ff9b::8.8.8.8"));
    host.set(["9.9.9.9".parse().unwrap(), "2606::1".parse().unwrap()]);
    assert!(opens(&policy, "8.8.8.8"));
    assert!(!opens(&policy, "9.9.9.9"));
    assert!(!opens(&policy, "2606::1"));
    policy.update(Egress {
        rules: vec![allow("host.example"), allow("2606::1")],
        ..Egress::default()
    });
    pin(&policy, "host.example", "9.9.9.9");
    assert!(!opens(&policy, "9.9.9.9"), "by a name");
    assert!(opens(&policy, "2606::1"), "by its address");
}

#[test]
fn a_rule_for_a_name_holds_for_the_addresses_that_were_given_for_it() {
    let policy = policy(&[], &[allow("*.example.org"), deny("*")]);
    assert!(!opens(&policy, "8.8.8.8"));
    pin(&policy, "www.example.org", "8.8.8.8");
    pin(&policy, "www.example.net", "9.9.9.9");
    pin(&policy, "six.example.org", "2606::1");
    assert!(opens(&policy, "8.8.8.8"));
    assert!(opens(&policy, "::ffff:8.8.8.8"));
    assert!(opens(&policy, "2606::1"));
    assert!(!opens(&policy, "9.9.9.9"));
    // Its rules change: what it learned stays.
    policy.update(Egress {
        rules: vec![allow("www.example.net"), deny("*")],
        ..Egress::default()
    });
    assert!(opens(&policy, "9.9.9.9"));
    assert!(!opens(&policy, "8.8.8.8"));
}

#[test]
fn a_name_that_leads_to_a_closed_address_does_not_open_it() {
    let addresses = [
        "10.0.0.1",
        "169.254.169.254",
        "127.0.0.1",
        "::1",
        "fd00:ec2::254",
        "::ffff:192.168.1.1",
        "64:ff9b::10.0.0.1",
        "10.213.0.1",
    ];
    for rules in [vec![], vec![allow("rebound.example")]] {
        let policy = policy(&rules, &rules);
        for address in addresses {
            pin(&policy, "rebound.example", address);
            assert!(!opens(&policy, address), "{address}");
        }
    }
    let policy = policy(&[], &[allow("rebound.example"), allow("10.0.0.1")]);
    pin(&policy, "rebound.example", "10.0.0.1");
    assert!(opens(&policy, "10.0.0.1"), "by its address");
}

#[test]
fn a_rule_for_ipv6_does_not_open_what_nat64_makes_of_it() {
    let policy = policy(&[], &[deny("64:ff9b::808:0/112"), allow("::/0")]);
    assert!(!opens(&policy, "64:ff9b::10.0.0.1"));
    assert!(!opens(&policy, "64:ff9b::8.8.0.1"));
    assert!(opens(&policy, "64:ff9b::8.9.0.1"));
    assert!(opens(&policy, "fd00::1"));
}

#[test]
fn a_closed_name_is_not_answered_and_its_addresses_are_closed() {
    let narrow = Rule {
        protocol: RuleProtocol::Tcp,
        ports: (25, 25),
        ..deny("mail.example")
    };
    let policy = policy(
        &[allow("1.2.3.0/24")],
        &[
            allow("good.bad.example"),
            deny("*.bad.example"),
            deny("bad.example"),
            narrow,
        ],
    );
    for (asked, expected) in [
        ("good.bad.example", true),
        ("bad.example", false),
        ("a.bad.example", false),
        ("mail.example", true),
        ("other.example", true),
    ] {
        assert_eq!(asks(&policy, asked), expected, "{asked}");
    }
    pin(&policy, "mail.example", "9.9.9.9");
    let to = |port| policy.decide(RuleProtocol::Tcp, "9.9.9.9".parse().unwrap(), port);
    assert_eq!(to(25), Verdict::Deny);
    assert_eq!(to(26), Verdict::Allow);
    // An address that a closed name shares is closed: nobody can tell them apart.
    pin(&policy, "x.bad.example", "9.9.9.8");
    pin(&policy, "other.example", "9.9.9.8");
    assert!(!opens(&policy, "9.9.9.8"));
}

#[test]
fn where_all_else_is_closed_other_names_are_not_answered() {
    let only = policy(&[], &[allow("example.org"), deny("*")]);
    assert!(asks(&only, "example.org"));
    assert!(!asks(&only, "secret.attacker.example"));
    assert_eq!(only.may_ask(None), Verdict::Deny);
    let with_network = policy(&[], &[allow("10.0.0.0/8"), deny("*")]);
    assert!(asks(&with_network, "db.internal"));
    let no_mail = Rule {
        ports: (25, 25),
        ..deny("*")
    };
    assert!(asks(&policy(&[], &[no_mail]), "example.org"));
}

proptest! {
    #[test]
    fn decisions_never_panic_and_offline_and_loopback_stay_closed(
        bits in any::<u128>(), port in any::<u16>(), four in any::<bool>(), number in any::<u8>(),
    ) {
        let address = if four {
            IpAddr::from((bits as u32).to_be_bytes())
        } else {
            IpAddr::from(bits.to_be_bytes())
        };
        let protocol = RuleProtocol::from_wire(number % 5);
        let open = policy(&[], &[allow("*")]);
        let verdict = open.decide(protocol, address, port);
        if address.to_canonical().is_loopback() || address.to_canonical().is_multicast() {
            prop_assert_eq!(verdict, Verdict::Deny);
        }
        open.update(Egress { offline: true, ..Egress::default() });
        prop_assert_eq!(open.decide(protocol, address, port), Verdict::Deny);
    }
}
