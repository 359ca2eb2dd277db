//! Where clients' requests, and those of the edge, wait for control and its answers find their way back. It survives
//! control: what was in flight when one died goes to the next, unless doing it twice could show.
//! It must never hold more than [`MAX_PENDING`] requests, nor one without an end.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use protocol::host::proxy::{ApiAbandoned, ApiReply, ApiRequest, EdgeRequest};
use protocol::message::encode_body;
use protocol::{ErrorBody, ErrorCode, Frame, Kind, Message};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot, watch};

/// Most requests that wait for an answer, over all clients. At [`protocol::vm::MAX_REQUEST`] bytes
/// each they hold at most 60 MiB.
const MAX_PENDING: usize = 1024;

/// How many of them may carry the same token, so that one client leaves room for others.
const MAX_PER_TOKEN: usize = MAX_PENDING / 2;

/// Most `Hello`s that wait for an answer. They have room of their own: whoever fills the other one
/// keeps nobody from being let in.
const MAX_GREETINGS: usize = 128;

/// Most requests of the edge that wait for an answer. Visitors of public addresses and clients of the
/// API cannot take each other's room.
const MAX_EDGE: usize = 256;

/// How long a request waits while there is no control to send it to.
const WITHOUT_CONTROL: Duration = Duration::from_secs(15);

/// How often a request is sent before it is taken for the cause of control's deaths.
const MAX_SENDS: u8 = 3;

/// An answer, with the agent's stream when its kind is `OPENED`.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) frame: Frame,
    pub(crate) stream: Option<OwnedFd>,
}

/// What is to be sent to control next.
#[derive(Debug)]
pub(crate) enum Outgoing {
    Request(Arc<ApiRequest>),
    Edge(Arc<EdgeRequest>),
    Abandoned(ApiAbandoned),
}

/// A request, and where it came from.
#[derive(Clone, Debug)]
enum Request {
    Api(Arc<ApiRequest>),
    Edge(Arc<EdgeRequest>),
}

impl Request {
    fn kind(&self) -> Kind {
        match self {
            Self::Api(request) => Kind(request.kind),
            Self::Edge(request) => Kind(request.kind),
        }
    }

    fn has_token(&self, token: &str) -> bool {
        match self {
            Self::Api(request) => request.token == token,
            Self::Edge(_) => false,
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Desk {
    state: Mutex<State>,
    /// Rung when `outbox` may have grown.
    mail: Notify,
    /// Whether some control is connected.
    control: watch::Sender<bool>,
    room: Arc<Semaphore>,
    greetings: Arc<Semaphore>,
    edge: Arc<Semaphore>,
    without_control: Duration,
}

#[derive(Debug, Default)]
struct State {
    next_ticket: u64,
    /// Counts the controls that have connected; the current one's number.
    incarnation: u64,
    pending: BTreeMap<u64, Pending>,
    outbox: VecDeque<Outbox>,
}

#[derive(Debug)]
struct Pending {
    request: Request,
    answer: oneshot::Sender<Result<Answer, ErrorBody>>,
    /// Sent to the current control.
    sent: bool,
    sends: u8,
    room: OwnedSemaphorePermit,
}

/// Every entry holds its room, so that clients who come and go cannot grow the queue either.
#[derive(Debug)]
enum Outbox {
    Request(u64),
    Abandoned(
        u64,
        #[expect(dead_code, reason = "held, not read")] OwnedSemaphorePermit,
    ),
}

impl Desk {
    pub(crate) fn new() -> Self {
        Self::with_wait(WITHOUT_CONTROL)
    }

    pub(crate) fn with_wait(without_control: Duration) -> Self {
        Self {
            state: Mutex::default(),
            mail: Notify::new(),
            control: watch::Sender::new(false),
            room: Arc::new(Semaphore::new(MAX_PENDING)),
            greetings: Arc::new(Semaphore::new(MAX_GREETINGS)),
            edge: Arc::new(Semaphore::new(MAX_EDGE)),
            without_control,
        }
    }

    /// Puts a request to control and waits for the answer. Dropping the call abandons the request.
    pub(crate) async fn ask(
        &self,
        token: String,
        kind: Kind,
        body: Vec<u8>,
    ) -> Result<Answer, ErrorBody> {
        let (room, in_share) = match kind {
            Kind::HELLO => (&self.greetings, true),
            _ => (&self.room, self.share(&token) < MAX_PER_TOKEN),
        };
        let Ok(room) = Arc::clone(room).try_acquire_owned() else {
            return Err(unavailable(
                "the appliance has as many requests under way as it can hold; try again shortly",
            ));
        };
        if !in_share {
            return Err(unavailable(
                "this token has as many requests under way as it may have; wait for one to end",
            ));
        }
        let request = |ticket| {
            Request::Api(Arc::new(ApiRequest {
                ticket,
                token,
                kind: kind.0,
                body,
            }))
        };
        self.wait(request, room).await
    }

    /// Puts a question of the edge to control, likewise.
    pub(crate) async fn ask_edge<Q: Message>(&self, question: &Q) -> Result<Answer, ErrorBody> {
        let body = encode_body(question)?;
        let Ok(room) = Arc::clone(&self.edge).try_acquire_owned() else {
            return Err(unavailable(
                "the appliance starts as many VMs as it can at once; try again shortly",
            ));
        };
        let request = |ticket| {
            Request::Edge(Arc::new(EdgeRequest {
                ticket,
                kind: Q::KIND.0,
                body,
            }))
        };
        self.wait(request, room).await
    }

    async fn wait(
        &self,
        request: impl FnOnce(u64) -> Request,
        room: OwnedSemaphorePermit,
    ) -> Result<Answer, ErrorBody> {
        let (answer, mut answered) = oneshot::channel();
        let ticket = self.submit(request, answer, room);
        let _abandon = AbandonOnDrop { desk: self, ticket };
        let mut control = self.control.subscribe();
        loop {
            let connected = *control.borrow_and_update();
            let lonely = async {
                if connected {
                    std::future::pending::<()>().await;
                }
                tokio::time::sleep(self.without_control).await;
            };
            tokio::select! {
                biased;
                result = &mut answered => {
                    return result.unwrap_or_else(|_| Err(unavailable("the request was lost")));
                }
                // The sender lives as long as the desk.
                _ = control.changed() => {}
                () = lonely => {
                    return Err(unavailable(
                        "the appliance's control process has not come back; try again shortly",
                    ));
                }
            }
        }
    }

    /// How many requests with this token wait for an answer.
    fn share(&self, token: &str) -> usize {
        let state = self.lock();
        let same = |pending: &&Pending| pending.request.has_token(token);
        state.pending.values().filter(same).count()
    }

    /// A new control is there; whatever the one before it had is taken back. Gives the new one's
    /// number.
    pub(crate) fn connected(&self) -> u64 {
        let mut state = self.lock();
        take_back(&mut state);
        state.incarnation = state.incarnation.wrapping_add(1);
        let incarnation = state.incarnation;
        drop(state);
        self.control.send_replace(true);
        self.mail.notify_waiters();
        incarnation
    }

    /// The control of this number is gone.
    pub(crate) fn disconnected(&self, incarnation: u64) {
        let mut state = self.lock();
        if state.incarnation != incarnation {
            return;
        }
        take_back(&mut state);
        drop(state);
        self.control.send_replace(false);
    }

    /// What to send to the control of this number next; none when it was replaced.
    pub(crate) async fn next(&self, incarnation: u64) -> Option<Outgoing> {
        loop {
            let mail = self.mail.notified();
            tokio::pin!(mail);
            // From here on a ring is not missed.
            mail.as_mut().enable();
            {
                let mut state = self.lock();
                if state.incarnation != incarnation {
                    return None;
                }
                while let Some(entry) = state.outbox.pop_front() {
                    match entry {
                        Outbox::Request(ticket) => {
                            let Some(pending) = state.pending.get_mut(&ticket) else {
                                continue;
                            };
                            pending.sent = true;
                            pending.sends = pending.sends.saturating_add(1);
                            return Some(match pending.request.clone() {
                                Request::Api(request) => Outgoing::Request(request),
                                Request::Edge(request) => Outgoing::Edge(request),
                            });
                        }
                        Outbox::Abandoned(ticket, _) => {
                            return Some(Outgoing::Abandoned(ApiAbandoned { ticket }));
                        }
                    }
                }
            }
            mail.await;
        }
    }

    /// Hands control's answer to whoever waits for it. Nobody waits for an abandoned request.
    pub(crate) fn answered(&self, reply: ApiReply, mut descriptors: Vec<OwnedFd>) {
        let Some(pending) = self.lock().pending.remove(&reply.ticket) else {
            return;
        };
        let kind = Kind(reply.kind);
        let stream = (kind == Kind::OPENED).then(|| descriptors.pop()).flatten();
        let result = if kind == Kind::OPENED && stream.is_none() {
            Err(ErrorBody::host(
                ErrorCode::Internal,
                "control opened the VM but passed no stream",
            ))
        } else {
            Ok(Answer {
                frame: Frame {
                    kind,
                    flags: 0,
                    body: reply.body,
                },
                stream,
            })
        };
        // The client may have gone at this very moment.
        let _ = pending.answer.send(result);
    }

    fn submit(
        &self,
        request: impl FnOnce(u64) -> Request,
        answer: oneshot::Sender<Result<Answer, ErrorBody>>,
        room: OwnedSemaphorePermit,
    ) -> u64 {
        let mut state = self.lock();
        let ticket = state.next_ticket;
        state.next_ticket = ticket.wrapping_add(1);
        let request = request(ticket);
        state.pending.insert(
            ticket,
            Pending {
                request,
                answer,
                sent: false,
                sends: 0,
                room,
            },
        );
        state.outbox.push_back(Outbox::Request(ticket));
        drop(state);
        self.mail.notify_waiters();
        ticket
    }

    fn abandon(&self, ticket: u64) {
        let mut state = self.lock();
        let Some(pending) = state.pending.remove(&ticket) else {
            return;
        };
        if pending.sent {
            let entry = Outbox::Abandoned(ticket, pending.room);
            state.outbox.push_back(entry);
        } else {
            state
                .outbox
                .retain(|entry| !matches!(entry, Outbox::Request(waiting) if *waiting == ticket));
        }
        drop(state);
        self.mail.notify_waiters();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change under the lock is complete before anything that could panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes everything that a dead control was told ready to be told to the next one, or answers it.
fn take_back(state: &mut State) {
    state.outbox.clear();
    let mut kept = BTreeMap::new();
    for (ticket, mut pending) in std::mem::take(&mut state.pending) {
        let refusal = if !pending.sent {
            None
        } else if pending.request.kind() == Kind::DELETE_VM {
            // A second delete of a VM that is gone is answered `VmNotFound`, which only the
            // client, who knows that it asked before, can take for success. Everything else is the
            // same when done twice: a create carries its key, an answered open was not in flight.
            Some(unavailable(
                "the appliance's control process restarted meanwhile; delete again to be sure",
            ))
        } else if pending.sends >= MAX_SENDS {
            Some(ErrorBody::host(
                ErrorCode::Internal,
                format!(
                    "the appliance's control process ended {} times while it served this request; \
                     its log says why",
                    pending.sends
                ),
            ))
        } else {
            None
        };
        if let Some(refusal) = refusal {
            let _ = pending.answer.send(Err(refusal));
        } else {
            pending.sent = false;
            state.outbox.push_back(Outbox::Request(ticket));
            kept.insert(ticket, pending);
        }
    }
    state.pending = kept;
}

fn unavailable(message: &str) -> ErrorBody {
    ErrorBody::host(ErrorCode::Unavailable, message).retryable_after_ms(500)
}

struct AbandonOnDrop<'a> {
    desk: &'a Desk,
    ticket: u64,
}

impl Drop for AbandonOnDrop<'_> {
    fn drop(&mut self) {
        self.desk.abandon(self.ticket);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(desk: &Arc<Desk>, kind: Kind) -> tokio::task::JoinHandle<Result<Answer, ErrorBody>> {
        ask_with(desk, "t", kind)
    }

    fn ask_with(
        desk: &Arc<Desk>,
        token: &'static str,
        kind: Kind,
    ) -> tokio::task::JoinHandle<Result<Answer, ErrorBody>> {
        let desk = Arc::clone(desk);
        tokio::spawn(async move { desk.ask(token.into(), kind, vec![1]).await })
    }

    async fn next_ticket(desk: &Desk, incarnation: u64) -> u64 {
        match desk.next(incarnation).await.unwrap() {
            Outgoing::Request(request) => request.ticket,
            Outgoing::Edge(request) => request.ticket,
            Outgoing::Abandoned(gone) => panic!("abandoned {}", gone.ticket),
        }
    }

    fn answer(desk: &Desk, ticket: u64, kind: Kind) {
        let reply = ApiReply {
            ticket,
            kind: kind.0,
            body: vec![7],
        };
        desk.answered(reply, Vec::new());
    }

    #[tokio::test]
    async fn a_request_in_flight_goes_to_the_next_control() {
        let desk = Arc::new(Desk::new());
        let first = desk.connected();
        let asked = ask(&desk, Kind::CREATE_VM);
        let ticket = next_ticket(&desk, first).await;
        desk.disconnected(first);
        let second = desk.connected();
        assert!(desk.next(first).await.is_none());
        assert_eq!(next_ticket(&desk, second).await, ticket);
        answer(&desk, ticket, Kind::VM);
        assert_eq!(asked.await.unwrap().unwrap().frame.kind, Kind::VM);
    }

    fn visit(desk: &Arc<Desk>) -> tokio::task::JoinHandle<Result<Answer, ErrorBody>> {
        let desk = Arc::clone(desk);
        let wake = protocol::host::proxy::Wake {
            subdomain: "abcdefghijklmnopqrst".parse().unwrap(),
        };
        tokio::spawn(async move { desk.ask_edge(&wake).await })
    }

    #[tokio::test]
    async fn a_visitors_request_in_flight_goes_to_the_next_control() {
        let desk = Arc::new(Desk::new());
        let first = desk.connected();
        let asked = visit(&desk);
        let ticket = next_ticket(&desk, first).await;
        desk.disconnected(first);
        let second = desk.connected();
        assert_eq!(next_ticket(&desk, second).await, ticket);
        answer(&desk, ticket, Kind::AWAKE);
        assert_eq!(asked.await.unwrap().unwrap().frame.kind, Kind::AWAKE);
        assert_eq!(desk.edge.available_permits(), MAX_EDGE);
    }

    #[tokio::test]
    async fn a_delete_in_flight_is_given_back_to_the_client() {
        let desk = Arc::new(Desk::new());
        let first = desk.connected();
        let asked = ask(&desk, Kind::DELETE_VM);
        next_ticket(&desk, first).await;
        desk.connected();
        let error = asked.await.unwrap().unwrap_err();
        assert_eq!(error.code, ErrorCode::Unavailable);
        assert_eq!(error.retry, protocol::Retry::AfterMs);
    }

    #[tokio::test]
    async fn a_request_that_ends_control_each_time_is_given_up() {
        let desk = Arc::new(Desk::new());
        let asked = ask(&desk, Kind::GET_VM);
        for _ in 0..MAX_SENDS {
            let incarnation = desk.connected();
            next_ticket(&desk, incarnation).await;
        }
        desk.connected();
        let error = asked.await.unwrap().unwrap_err();
        assert_eq!(error.code, ErrorCode::Internal);
        assert_eq!(error.retry, protocol::Retry::No);
    }

    #[tokio::test]
    async fn a_request_that_finds_no_control_ends_with_unavailable() {
        let desk = Arc::new(Desk::with_wait(Duration::ZERO));
        let error = ask(&desk, Kind::GET_VM).await.unwrap().unwrap_err();
        assert_eq!(error.code, ErrorCode::Unavailable);
        assert_eq!(desk.room.available_permits(), MAX_PENDING);
        assert!(desk.lock().outbox.is_empty());
    }

    #[tokio::test]
    async fn control_learns_of_clients_that_left_and_late_answers_are_dropped() {
        let desk = Arc::new(Desk::new());
        let control = desk.connected();
        let asked = ask(&desk, Kind::CREATE_VM);
        let ticket = next_ticket(&desk, control).await;
        asked.abort();
        let Some(Outgoing::Abandoned(gone)) = desk.next(control).await else {
            panic!("not told");
        };
        assert_eq!(gone.ticket, ticket);
        answer(&desk, ticket, Kind::VM);
        assert_eq!(desk.room.available_permits(), MAX_PENDING);
    }

    #[tokio::test]
    async fn an_opened_answer_without_a_stream_is_an_error() {
        let desk = Arc::new(Desk::new());
        let control = desk.connected();
        let asked = ask(&desk, Kind::OPEN_VM);
        let ticket = next_ticket(&desk, control).await;
        answer(&desk, ticket, Kind::OPENED);
        assert_eq!(asked.await.unwrap().unwrap_err().code, ErrorCode::Internal);
    }

    #[tokio::test]
    async fn more_requests_than_there_is_room_for_are_refused() {
        let desk = Arc::new(Desk::new());
        let one = (0..MAX_PER_TOKEN).map(|_| ask(&desk, Kind::GET_VM));
        let mut waiting: Vec<_> = one.collect();
        while desk.room.available_permits() > MAX_PENDING - MAX_PER_TOKEN {
            tokio::task::yield_now().await;
        }
        // The first client has had its share, the others have theirs.
        let error = ask(&desk, Kind::GET_VM).await.unwrap().unwrap_err();
        assert!(error.message.starts_with("this token"), "{error}");
        for _ in MAX_PER_TOKEN..MAX_PENDING {
            waiting.push(ask_with(&desk, "other", Kind::GET_VM));
        }
        while desk.room.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        let error = ask_with(&desk, "third", Kind::GET_VM).await.unwrap();
        let error = error.unwrap_err();
        assert!(error.message.starts_with("the appliance has"), "{error}");
        let hello = ask_with(&desk, "third", Kind::HELLO);
        while desk.greetings.available_permits() == MAX_GREETINGS {
            tokio::task::yield_now().await;
        }
        hello.abort();
        // Visitors have theirs, whoever fills the other.
        let visitors: Vec<_> = (0..MAX_EDGE).map(|_| visit(&desk)).collect();
        while desk.edge.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        let error = visit(&desk).await.unwrap().unwrap_err();
        assert_eq!(error.code, ErrorCode::Unavailable);
        waiting.iter().for_each(tokio::task::JoinHandle::abort);
        while desk.room.available_permits() < MAX_PENDING {
            tokio::task::yield_now().await;
        }
        let client = ask(&desk, Kind::GET_VM);
        while desk.room.available_permits() == MAX_PENDING {
            tokio::task::yield_now().await;
        }
        client.abort();
        visitors.iter().for_each(tokio::task::JoinHandle::abort);
        waiting.iter().for_each(tokio::task::JoinHandle::abort);
    }
}
