//! Control as a whole, over its real sockets and on a real state directory. Only its neighbours are
//! stand-ins: the supervisor, proxy, and monitors whose guests follow a script.

mod guests;
mod lifecycle;
mod network;
mod panics;
mod proxy;
mod refusals;
mod restarts;
mod world;
