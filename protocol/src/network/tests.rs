use proptest::prelude::*;

use super::*;

fn network(text: &str) -> Destination {
    text.parse().unwrap()
}

#[test]
fn destinations_are_read_as_documented() {
    let net = |address: &str, prefix| Destination::Network {
        address: address.parse().unwrap(),
        prefix,
    };
    let name = |text: &str| text.parse::<DomainName>().unwrap();
    for (text, expected) in [
        ("*", Destination::Everything),
        ("192.0.2.0/24", net("192.0.2.0", 24)),
        ("192.0.2.7", net("192.0.2.7", 32)),
        ("0.0.0.0/0", net("0.0.0.0", 0)),
        ("255.255.255.255/32", net("255.255.255.255", 32)),
        ("2001:db8::1", net("2001:db8::1", 128)),
        ("2001:DB8::/32", net("2001:db8::", 32)),
        ("::/0", net("::", 0)),
        ("::ffff:192.0.2.0/120", net("192.0.2.0", 24)),
        ("::ffff:192.0.2.1", net("192.0.2.1", 32)),
        ("::ffff:0:0/96", net("0.0.0.0", 0)),
        ("example.org", Destination::Name(name("example.org"))),
        ("Example.ORG.", Destination::Name(name("example.org"))),
        ("localhost", Destination::Name(name("localhost"))),
        ("_srv._tcp.x-1", Destination::Name(name("_srv._tcp.x-1"))),
        ("*.example.org", Destination::Below(name("example.org"))),
        ("*.org", Destination::Below(name("org"))),
    ] {
        assert_eq!(text.parse(), Ok(expected), "{text}");
    }
}

#[test]
fn texts_that_mean_nothing_or_two_things_are_refused() {
    let long_label = "a".repeat(64);
    let long_name = vec!["a".repeat(49); 6].join(".");
    for text in [
        "",
        ".",
        "..",
        " ",
        "a b",
        " example.org",
        "a..b",
        ".example.org",
        "example.org..",
        "*.",
        "**",
        "*a.org",
        "a.*.org",
        "*.*.org",
        "*.192.0.2.1",
        "192.0.2",
        "192.0.2.256",
        "192.0.2.01",
        "127.1",
        "2130706433",
        "0x7f000001",
        "a.0x",
        "127.0.0.0x1",
        "192.0.2.0/",
        "192.0.2.0/+24",
        "192.0.2.0/-1",
        "192.0.2.0/256",
        "192.0.2.0/24/24",
        "192.0.2.0/255.255.255.0",
        "example.org/24",
        "example.org:443",
        "https://example.org",
        "fe80::1%eth0",
        "[2001:db8::1]",
        "münchen.example",
        long_label.as_str(),
        long_name.as_str(),
    ] {
        assert!(
            matches!(
                text.parse::<Destination>(),
                Err(DestinationError::Form(shown)) if shown.chars().count() <= 64
            ),
            "{text}: {:?}",
            text.parse::<Destination>()
        );
    }
    for text in ["192.0.2.0/33", "2001:db8::/129", "::ffff:192.0.2.0/129"] {
        assert!(matches!(
            text.parse::<Destination>(),
            Err(DestinationError::Prefix(_))
        ));
    }
    for (text, meant) in [
        ("192.0.2.1/24", "192.0.2.0/24"),
        ("10.0.0.0/7", "10.0.0.0/7"),
        ("2001:db8::1/64", "2001:db8::/64"),
        ("::ffff:192.0.2.1/120", "192.0.2.0/24"),
    ] {
        match text.parse::<Destination>() {
            Err(DestinationError::HostBits(_, network)) => assert_eq!(network.to_string(), meant),
            Ok(network) => assert_eq!(network.to_string(), meant, "{text}"),
            other => panic!("{text}: {other:?}"),
        }
    }
}

#[test]
fn a_network_contains_its_own_addresses_and_no_others() {
    for (net, inside, outside) in [
        ("192.0.2.0/24", "192.0.2.255", "192.0.3.0"),
        ("192.0.2.7", "192.0.2.7", "192.0.2.6"),
        ("128.0.0.0/1", "255.255.255.255", "127.255.255.255"),
        ("0.0.0.0/0", "8.8.8.8", "2001:db8::1"),
        ("::/0", "2001:db8::1", "8.8.8.8"),
        ("2001:db8::/33", "2001:db8:7fff::", "2001:db8:8000::"),
        ("192.0.2.0/24", "::ffff:192.0.2.1", "::192.0.2.1"),
        ("::ffff:192.0.2.0/120", "192.0.2.1", "192.0.3.1"),
    ] {
        assert!(
            network(net).contains(inside.parse().unwrap()),
            "{net} {inside}"
        );
        assert!(
            !network(net).contains(outside.parse().unwrap()),
            "{net} {outside}"
        );
    }
    assert!(!network("example.org").contains("192.0.2.1".parse().unwrap()));
    assert!(network("*").contains("::1".parse().unwrap()));
}

#[test]
fn a_rule_for_a_name_is_about_that_name_and_one_below_is_not_about_itself() {
    let name = |text: &str| text.parse::<DomainName>().unwrap();
    assert!(network("example.org").names(&name("EXAMPLE.org.")));
    assert!(!network("example.org").names(&name("www.example.org")));
    assert!(network("*.example.org").names(&name("a.b.example.org")));
    assert!(!network("*.example.org").names(&name("example.org")));
    assert!(!network("*.example.org").names(&name("badexample.org")));
    assert!(!network("*").names(&name("example.org")));
}

fn names() -> impl Strategy<Value = String> {
    proptest::collection::vec("[a-z0-9_-]{1,20}", 1..6)
        .prop_map(|labels| format!("{}.x", labels.join(".")))
}

fn destinations() -> impl Strategy<Value = Destination> {
    prop_oneof![
        Just(Destination::Everything),
        (any::<u32>(), 0..=32_u8).prop_map(|(bits, prefix)| Destination::Network {
            address: masked(Ipv4Addr::from_bits(bits).into(), prefix),
            prefix,
        }),
        (any::<u128>(), 0..=128_u8).prop_map(|(bits, prefix)| Destination::Network {
            address: masked(Ipv6Addr::from_bits(bits).into(), prefix),
            prefix,
        }),
        names().prop_map(|name| Destination::Name(name.parse().unwrap())),
        names().prop_map(|name| Destination::Below(name.parse().unwrap())),
    ]
}

proptest! {
    #[test]
    fn a_destination_is_read_back_from_its_text_and_from_the_wire(to in destinations()) {
        prop_assert_eq!(to.to_string().parse(), Ok(to.clone()));
        let bytes = postcard::to_allocvec(&to).unwrap();
        prop_assert_eq!(postcard::from_bytes(&bytes), Ok(to));
    }

    #[test]
    fn any_text_is_refused_or_read_back_from_its_display(text in "\\PC{0,40}|[0-9a-fx:./*]{0,30}") {
        if let Ok(to) = text.parse::<Destination>() {
            prop_assert_eq!(to.to_string().parse(), Ok(to));
        }
    }

    #[test]
    fn a_prefix_is_the_bits_that_are_shared(a in any::<u32>(), b in any::<u32>(), prefix in 0..=32_u8) {
        let to = Destination::Network {
            address: masked(Ipv4Addr::from_bits(a).into(), prefix),
            prefix,
        };
        let shared = (a ^ b).leading_zeros() >= u32::from(prefix);
        prop_assert_eq!(to.contains(Ipv4Addr::from_bits(b).into()), shared);
    }
}
