//! Where the daemon learns of pods. Each source tells of all that it knows, each
//! time something has changed; CNI's requests come through the socket.

pub(crate) mod cgroups;
pub(crate) mod directory;
pub(crate) mod kubernetes;
