//! An interpreter of iptables-restore text: what the chains would do with a connection.
