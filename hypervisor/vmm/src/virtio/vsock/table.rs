//! All connections of a guest by their host ports: who comes in, whose turn it is to send, who is
//! given up when there is no more room. It sends nothing itself.
#![deny(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::arithmetic_side_effects
)]

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::AsRawFd as _;
use std::sync::Arc;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::MOST_CONNECTIONS;
use super::connection::Due;
use super::host::{Inbox, Wanted};
use super::link::Link;
use crate::virtio::worker::DEVICE_TOKENS;

/// Host ports begin where no service has its place. They double as epoll tokens.
const FIRST_PORT: u32 = 1 << 16;

/// See the module.
pub(super) struct Table {
    inbox: Arc<Inbox>,
    /// Where the links' sockets are watched.
    pub(super) epoll: Option<Arc<Epoll>>,
    /// By host port.
    pub(super) links: HashMap<u32, Link>,
    /// Host ports of links that have something for the guest, in turn.
    pub(super) line: VecDeque<u32>,
    /// Host ports of links whose host side has vanished, oldest first.
    vanished: VecDeque<u32>,
    pub(super) next_port: u32,
}

impl Table {
    pub(super) fn new(inbox: Arc<Inbox>) -> Self {
        Self {
            inbox,
            epoll: None,
            links: HashMap::new(),
            line: VecDeque::new(),
            vanished: VecDeque::new(),
            next_port: FIRST_PORT,
        }
    }

    /// Ports go on from here after a restore.
    pub(super) fn continue_at(&mut self, port: u32) {
        self.next_port = port.clamp(FIRST_PORT, u32::MAX.saturating_sub(1));
    }

    /// Takes a wanted stream in, or refuses it. Gives the host's and the guest's port of a connection
    /// that was given up for it, if the guest has to hear of that.
    pub(super) fn add(&mut self, wanted: Wanted, agent_rang: bool) -> Option<(u32, u32)> {
        let Wanted {
            ticket,
            port,
            wait_for_agent,
            stream,
        } = wanted;
        let mut evicted = None;
        if self.links.len() >= MOST_CONNECTIONS {
            match self.make_room() {
                Some(link) => evicted = link,
                None => {
                    self.inbox.refuse(
                        ticket,
                        "the guest has too many open streams; close some and try again",
                    );
                    return None;
                }
            }
        }
        let link = Link::new(port, ticket, wait_for_agent && !agent_rang, stream);
        let host_port = self.free_port();
        if let Err(error) = self.watch(host_port, &link) {
            self.inbox.refuse(
                ticket,
                &format!("the stream's socket cannot be watched: {error}"),
            );
            return evicted;
        }
        self.links.insert(host_port, link);
        self.line_up(host_port);
        evicted
    }

    fn watch(&self, host_port: u32, link: &Link) -> io::Result<()> {
        if let (Some(epoll), Some(stream)) = (&self.epoll, link.stream()) {
            let events = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
            let token = DEVICE_TOKENS.saturating_add(u64::from(host_port));
            epoll.ctl(
                ControlOperation::Add,
                stream.as_raw_fd(),
                EpollEvent::new(events, token),
            )?;
        }
        Ok(())
    }

    /// Gives up the connection whose host side vanished first: None when there is no such.
    fn make_room(&mut self) -> Option<Option<(u32, u32)>> {
        while let Some(host_port) = self.vanished.pop_front() {
            if let Some(mut link) = self.links.remove(&host_port) {
                link.give_up();
                let tell = link.connection.due(false) == Some(Due::Reset);
                return Some(tell.then_some((host_port, link.guest_port)));
            }
        }
        None
    }

    fn free_port(&mut self) -> u32 {
        // The table has far fewer entries than there are ports.
        loop {
            let port = self.next_port;
            self.next_port = match port.checked_add(1) {
                // The highest number means "any port".
                Some(next) if next < u32::MAX => next,
                _ => FIRST_PORT,
            };
            if !self.links.contains_key(&port) {
                return port;
            }
        }
    }

    /// Puts a link in line if it has something for the guest.
    pub(super) fn line_up(&mut self, host_port: u32) {
        if let Some(link) = self.links.get_mut(&host_port)
            && !link.in_line
            && link.connection.due(link.is_readable()).is_some()
        {
            link.in_line = true;
            self.line.push_back(host_port);
        }
    }

    /// After anything happened to a link: it leaves when it is over, or stands in line.
    pub(super) fn settle(&mut self, host_port: u32) {
        let Some(link) = self.links.get_mut(&host_port) else {
            return;
        };
        link.settle();
        if link.is_over() {
            if let Some(ticket) = link.ticket.take() {
                self.inbox.refuse(
                    ticket,
                    "the host's side was closed before the guest answered",
                );
            }
            self.links.remove(&host_port);
            return;
        }
        if link.has_hung_up() && !link.listed_as_vanished {
            link.listed_as_vanished = true;
            self.vanished.push_back(host_port);
            if self.vanished.len() > MOST_CONNECTIONS.saturating_mul(2) {
                let links = &self.links;
                self.vanished.retain(|port| links.contains_key(port));
            }
        }
        self.line_up(host_port);
    }

    /// The guest forgot its connections: so does the host. Requests it has not seen stay.
    pub(super) fn forget(&mut self, keep_unseen: bool, why: &str) {
        let inbox = &self.inbox;
        self.links.retain(|_, link| {
            let unseen = link.connection.is_pending() && !link.connection.is_requested();
            if keep_unseen && unseen {
                return true;
            }
            if let Some(ticket) = link.ticket.take() {
                inbox.refuse(ticket, why);
            }
            false
        });
        self.vanished.clear();
        let links = &self.links;
        self.line.retain(|port| links.contains_key(port));
    }
}
