//! The proxy on plain loopback: a table stands in for the kernel's memory of original destinations.

use std::{
    collections::HashMap,
    sync::{LazyLock, Mutex},
    time::Instant,
};

use tokio::{sync::mpsc, task::JoinHandle};

use super::*;

/// Original destinations by client address.
static DESTINATIONS: LazyLock<Mutex<HashMap<SocketAddr, SocketAddr>>> =
    LazyLock::new(Mutex::default);

const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const ANY_PORT: SocketAddr = SocketAddr::new(LOCALHOST, 0);

fn from_table(stream: &TcpStream) -> io::Result<SocketAddr> {
    let destinations = DESTINATIONS.lock().unwrap();
    destinations
        .get(&stream.peer_addr()?)
        .copied()
        .ok_or_else(|| io::ErrorKind::NotFound.into())
}

fn config() -> Config {
    Config {
        outbound_port: 0,
        inbound_port: 0,
        bind: vec![LOCALHOST],
        passthrough_v4: Ipv4Addr::new(127, 0, 0, 6),
        passthrough_v6: "::6".parse().unwrap(),
    }
}

struct Fixture {
    outbound: SocketAddr,
    inbound: SocketAddr,
    stop: CancellationToken,
    events: mpsc::UnboundedReceiver<Event>,
    running: JoinHandle<()>,
}

impl Fixture {
    fn new() -> Self {
        Self::asking(from_table)
    }

    fn asking(original_destination: fn(&TcpStream) -> io::Result<SocketAddr>) -> Self {
        let mut proxy = Proxy::bind(&config()).unwrap();
        proxy.forwarding.original_destination = original_destination;
        let addresses: Vec<_> = proxy.addresses().collect();
        let stop = CancellationToken::new();
        let (sender, events) = mpsc::unbounded_channel();
        let running = tokio::spawn(proxy.run(stop.clone(), move |event| {
            // A test that has what it wants no longer listens.
            let _ = sender.send(event);
        }));
        Self {
            outbound: addresses[0],
            inbound: addresses[1],
            stop,
            events,
            running,
        }
    }

    /// A client whose connection through the proxy is meant for `server`.
    async fn outbound(&self, server: SocketAddr) -> TcpStream {
        client(self.outbound, Some(server)).await
    }

    /// Both ends of a connection through the proxy, which has carried a byte.
    async fn established(&self) -> (TcpStream, TcpStream) {
        let server = TcpListener::bind(ANY_PORT).await.unwrap();
        let mut client = self.outbound(server.local_addr().unwrap()).await;
        let (mut server, _) = server.accept().await.unwrap();
        client.write_all(b"!").await.unwrap();
        server.read_exact(&mut [0]).await.unwrap();
        (client, server)
    }

    async fn ended(&mut self) -> Connection {
        match timeout(Duration::from_secs(10), self.events.recv()).await {
            Ok(Some(Event::Ended(connection))) => connection,
            other => panic!("not the end of a connection: {other:?}"),
        }
    }
}

async fn client(proxy: SocketAddr, destination: Option<SocketAddr>) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    // Small, so that the stalled transfer below stalls early.
    socket.set_send_buffer_size(64 * 1024).unwrap();
    socket.bind(ANY_PORT).unwrap();
    if let Some(destination) = destination {
        DESTINATIONS
            .lock()
            .unwrap()
            .insert(socket.local_addr().unwrap(), destination);
    }
    socket.connect(proxy).await.unwrap()
}

fn forwarding() -> Forwarding {
    Forwarding {
        original_destination: from_table,
        passthrough_v4: config().passthrough_v4,
        passthrough_v6: config().passthrough_v6,
        abort: CancellationToken::new(),
    }
}

/// An accepted stream with `destination` in the table, and its record with other addresses.
async fn accepted(
    client_address: &str,
    local: &str,
    destination: SocketAddr,
) -> (TcpStream, Connection) {
    let listener = TcpListener::bind(ANY_PORT).await.unwrap();
    let _client = client(listener.local_addr().unwrap(), Some(destination)).await;
    let (stream, _) = listener.accept().await.unwrap();
    let connection = Connection {
        direction: Direction::Outbound,
        client: client_address.parse().unwrap(),
        original_dst: None,
        local: local.parse().unwrap(),
        upstream: None,
        sent: 0,
        received: 0,
        result: Ok(()),
    };
    (stream, connection)
}

async fn read_all(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut all = Vec::new();
    let reading = stream.read_to_end(&mut all);
    timeout(Duration::from_secs(10), reading)
        .await
        .expect("the stream ends")?;
    Ok(all)
}

async fn assert_reset(stream: &mut TcpStream) {
    let error = read_all(stream).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

fn reset(stream: TcpStream) {
    stream.set_zero_linger().unwrap();
}

fn message(connection: &Connection) -> String {
    connection.result.as_ref().unwrap_err().to_string()
}

#[tokio::test]
async fn client_may_close_its_direction_first() {
    let mut fixture = Fixture::new();
    let (mut client, mut server) = fixture.established().await;

    let (client_address, proxy) = (client.local_addr().unwrap(), fixture.outbound);
    let (upstream, destination) = (server.peer_addr().unwrap(), server.local_addr().unwrap());

    client.write_all(b"request").await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(read_all(&mut server).await.unwrap(), b"request");
    server.write_all(b"response").await.unwrap();
    server.shutdown().await.unwrap();
    assert_eq!(read_all(&mut client).await.unwrap(), b"response");

    let connection = fixture.ended().await;
    assert_eq!(
        connection.to_string(),
        format!(
            "outbound client={client_address} original_dst={destination} local={proxy} upstream={upstream} \
             sent=8 received=8 result=ok"
        )
    );
    assert_eq!(
        serde_json::to_string(&connection).unwrap(),
        format!(
            r#"{{"direction":"outbound","client":"{client_address}","original_dst":"{destination}","#
        ) + &format!(
            r#""local":"{proxy}","upstream":"{upstream}","sent":8,"received":8,"result":"ok"}}"#
        )
    );
}

#[tokio::test]
async fn server_may_close_its_direction_first() {
    let mut fixture = Fixture::new();
    let (mut client, mut server) = fixture.established().await;

    server.write_all(b"banner").await.unwrap();
    server.shutdown().await.unwrap();
    assert_eq!(read_all(&mut client).await.unwrap(), b"banner");
    client.write_all(b"answer").await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(read_all(&mut server).await.unwrap(), b"answer");

    let connection = fixture.ended().await;
    assert!(connection.result.is_ok());
    assert_eq!((connection.sent, connection.received), (7, 6));
}

#[tokio::test]
async fn inbound_comes_from_the_passthrough_address() {
    let mut fixture = Fixture::new();
    let server = TcpListener::bind(ANY_PORT).await.unwrap();
    let client = client(fixture.inbound, Some(server.local_addr().unwrap())).await;
    let (_, peer) = server.accept().await.unwrap();
    assert_eq!(peer.ip(), IpAddr::V4(Ipv4Addr::new(127, 0, 0, 6)));
    drop(client);

    let connection = fixture.ended().await;
    assert_eq!(connection.direction, Direction::Inbound);
    assert_eq!(connection.upstream, Some(peer));
}

#[tokio::test]
async fn slow_reader_slows_the_writer() {
    const TOTAL: usize = 64 * 1024 * 1024;
    /// What the kernel's buffers of four sockets may hold; the proxy itself adds little.
    const BUFFERED: usize = 32 * 1024 * 1024;

    let mut fixture = Fixture::new();
    let server = TcpSocket::new_v4().unwrap();
    server.set_recv_buffer_size(64 * 1024).unwrap();
    server.bind(ANY_PORT).unwrap();
    let server = server.listen(1).unwrap();
    let mut client = fixture.outbound(server.local_addr().unwrap()).await;
    let (mut server, _) = server.accept().await.unwrap();

    let chunk = vec![7; 64 * 1024];
    let mut written = 0;
    while let Ok(n) = timeout(Duration::from_millis(500), client.write(&chunk)).await {
        written += n.unwrap();
        assert!(
            written < BUFFERED,
            "the proxy takes more than it can pass on"
        );
    }

    let writer = tokio::spawn(async move {
        while written < TOTAL {
            let n = chunk.len().min(TOTAL - written);
            written += client.write(&chunk[..n]).await.unwrap();
        }
        client.shutdown().await.unwrap();
        client
    });
    let mut read = 0;
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let n = server.read(&mut buffer).await.unwrap();
        if n == 0 {
            break;
        }
        assert!(buffer[..n].iter().all(|&byte| byte == 7));
        read += n;
    }
    assert_eq!(read, TOTAL);
    drop(server);
    writer.await.unwrap();

    let connection = fixture.ended().await;
    assert!(connection.result.is_ok());
    assert_eq!(connection.sent, TOTAL as u64);
}

#[tokio::test]
async fn client_reset_resets_the_server() {
    let mut fixture = Fixture::new();
    let (client, mut server) = fixture.established().await;
    reset(client);
    assert_reset(&mut server).await;
    assert!(message(&fixture.ended().await).starts_with("client: "));
}

#[tokio::test]
async fn server_reset_resets_the_client() {
    let mut fixture = Fixture::new();
    let (mut client, server) = fixture.established().await;
    reset(server);
    assert_reset(&mut client).await;
    assert!(message(&fixture.ended().await).starts_with("destination: "));
}

#[tokio::test]
async fn client_reset_after_its_end_resets_the_server() {
    let mut fixture = Fixture::new();
    let (mut client, mut server) = fixture.established().await;
    client.shutdown().await.unwrap();
    assert_eq!(server.read(&mut [0]).await.unwrap(), 0);
    reset(client);
    // Reading says "end" again, so look for the error itself.
    let error = timeout(Duration::from_secs(10), failure(&server)).await;
    assert!(error.is_ok(), "the server never learns of the reset");
    assert!(message(&fixture.ended().await).starts_with("client: "));
    assert!(server.write(b"late").await.is_err());
}

#[tokio::test]
async fn server_reset_after_its_end_resets_the_client() {
    let mut fixture = Fixture::new();
    let (mut client, mut server) = fixture.established().await;
    server.shutdown().await.unwrap();
    assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
    reset(server);
    let error = timeout(Duration::from_secs(10), failure(&client)).await;
    assert!(error.is_ok(), "the client never learns of the reset");
    assert!(message(&fixture.ended().await).starts_with("destination: "));
}

#[tokio::test]
async fn refused_destination_resets_the_client() {
    let mut fixture = Fixture::new();
    let server = TcpListener::bind(ANY_PORT).await.unwrap();
    let address = server.local_addr().unwrap();
    drop(server);
    let mut client = fixture.outbound(address).await;
    assert_reset(&mut client).await;

    let connection = fixture.ended().await;
    assert_eq!(connection.original_dst, Some(address));
    assert!(connection.to_string().ends_with(
        "upstream=- sent=0 received=0 result=\"connect: Connection refused (os error 111)\""
    ));
}

#[tokio::test]
async fn missing_passthrough_address_is_named() {
    // TEST-NET-1, which no machine has.
    let source = "192.0.2.6".parse().unwrap();
    let error = connect(ANY_PORT, Some(source)).await.unwrap_err();
    assert!(error.to_string().starts_with("bind to source 192.0.2.6: "));
}

#[tokio::test]
async fn unknown_destination_resets_the_client() {
    let mut fixture = Fixture::new();
    let mut client = client(fixture.outbound, None).await;
    assert_reset(&mut client).await;
    let connection = fixture.ended().await;
    assert!(connection.original_dst.is_none());
    assert!(message(&connection).starts_with("no original destination: "));
}

#[tokio::test]
async fn own_port_is_a_loop() {
    let mut fixture = Fixture::new();
    let mut client = fixture.outbound(fixture.outbound).await;
    assert_reset(&mut client).await;
    let connection = fixture.ended().await;
    assert_eq!(connection.original_dst, Some(fixture.outbound));
    assert!(connection.to_string().ends_with("result=\"loop\""));
}

#[tokio::test]
async fn kernel_answer_for_a_direct_connection_is_never_followed() {
    // Without connection tracking there is no answer; with it, the answer is the proxy itself.
    let mut fixture = Fixture::asking(original_destination);
    let mut client = client(fixture.outbound, None).await;
    assert_reset(&mut client).await;
    let connection = fixture.ended().await;
    assert!(matches!(
        connection.result,
        Err(ConnectionError::NoOriginalDestination(_) | ConnectionError::Loop)
    ));
    assert!(connection.upstream.is_none());
}

#[tokio::test]
async fn steered_connection_is_no_loop() {
    // As sk_lookup leaves it: the accepted socket's own address is the destination.
    let steered: SocketAddr = "10.77.0.2:8080".parse().unwrap();
    let (stream, mut connection) = accepted("10.77.0.9:40000", "10.77.0.2:8080", steered).await;
    let destination = forwarding().destination(&stream, &mut connection, 15006);
    assert_eq!(destination.unwrap(), steered);
}

#[tokio::test]
async fn another_proxys_port_is_no_loop() {
    let other: SocketAddr = "10.77.0.3:15001".parse().unwrap();
    let (stream, mut connection) = accepted("10.77.0.2:40000", "127.15.1.3:15001", other).await;
    let destination = forwarding().destination(&stream, &mut connection, 15001);
    assert_eq!(destination.unwrap(), other);
}

#[tokio::test]
async fn taken_port_is_named() {
    let holder = TcpListener::bind(ANY_PORT).await.unwrap();
    let taken = holder.local_addr().unwrap();
    let config = Config {
        outbound_port: taken.port(),
        ..config()
    };
    let error = Proxy::bind(&config).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("listen on {taken} for outbound connections")
    );
}

#[tokio::test]
async fn one_port_for_both_directions_is_refused() {
    let config = Config {
        outbound_port: 15001,
        inbound_port: 15001,
        ..config()
    };
    assert!(matches!(Proxy::bind(&config), Err(Error::SamePort(15001))));
}

#[tokio::test]
async fn idle_proxy_stops_at_once() {
    let fixture = Fixture::new();
    fixture.stop.cancel();
    let started = Instant::now();
    fixture.running.await.unwrap();
    assert!(started.elapsed() < GRACE / 2);
    assert!(TcpStream::connect(fixture.outbound).await.is_err());
}

#[tokio::test]
async fn live_connections_have_a_grace_period() {
    let mut fixture = Fixture::new();
    let (mut client, mut server) = fixture.established().await;
    let started = Instant::now();
    fixture.stop.cancel();
    while TcpStream::connect(fixture.inbound).await.is_ok() {
        assert!(started.elapsed() < GRACE / 2, "still listening");
        sleep(Duration::from_millis(10)).await;
    }
    client.write_all(b"late").await.unwrap();
    let mut data = [0; 4];
    server.read_exact(&mut data).await.unwrap();

    assert_reset(&mut client).await;
    assert_reset(&mut server).await;
    assert!(started.elapsed() >= GRACE);
    (&mut fixture.running).await.unwrap();
    loop {
        // The attempts above end here too, if one was still accepted.
        let connection = fixture.ended().await;
        if connection.client == client.local_addr().unwrap() {
            assert_eq!(message(&connection), "the proxy was stopped");
            assert_eq!(connection.sent, 5);
            break;
        }
    }
}
