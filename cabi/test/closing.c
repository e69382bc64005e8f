// closing.c - tailnode_close ends whatever the host holds on to, in every state that a descriptor can be in, and does not wait for the host.
#include "check.h"

static int end_of(int fd) { // 0: end of file, else the errno, after whatever there is to read
	static char buf[1 << 16];
	ssize_t n;
	while ((n = read(fd, buf, sizeof buf)) > 0)
		;
	return n == 0 ? 0 : errno;
}

int main(void) {
	alarm(120); // a hang
	// Not an ephemeral node, which control takes out of the other's netmap when it is closed: what of its resets is still under way then is not heard.
	tailnode_options o = options("cclosea");
	o.flags &= ~TAILNODE_EPHEMERAL;
	tailnode_node a, b = up("ccloseb");
	OK(tailnode_new(&o, &a, &err));
	OK(tailnode_up(a, 30000, &err));
	int ln, quiet, c;
	char x;
	tailnode_addr bound, any;
	OK(tailnode_listen(b, "tcp", ":80", 0, &ln, NULL, &err));

	// The peer's half is over, and the host knows, and keeps its own open.
	int peer_done;
	OK(tailnode_dial(a, "tcp", "gopeer:20", 0, 30000, &peer_done, NULL, NULL, &err));
	CHECK(end_of(peer_done) == 0);
	// The same with data that the host has not read.
	int unread;
	OK(tailnode_dial(a, "tcp", "gopeer:20", 0, 30000, &unread, NULL, NULL, &err));
	wait_in(unread, 30000);
	// The host's half is over, the peer's is not; both ends are this program's.
	int host_done, peer;
	OK(tailnode_dial(a, "tcp", "ccloseb:80", 0, 30000, &host_done, NULL, NULL, &err));
	OK(tailnode_accept(ln, 0, &peer, NULL, NULL, &err));
	CHECK(shutdown(host_done, SHUT_WR) == 0 && read(peer, &x, 1) == 0);
	// Nothing is over.
	int idle;
	OK(tailnode_dial(a, "tcp", "gopeer:7", 0, 30000, &idle, NULL, NULL, &err));
	// The host does not read, and everything is full.
	int full;
	OK(tailnode_dial(a, "tcp", "gopeer:19", 0, 30000, &full, NULL, NULL, &err));
	write_all(full, "\0\0\0\1\0\0\0\0", 8); // 4 GB
	wait_in(full, 30000);
	// The peer does not read, and everything is full.
	int stuck, stuck_peer;
	OK(tailnode_dial(a, "tcp", "ccloseb:80", TAILNODE_NONBLOCK, 30000, &stuck, NULL, NULL, &err));
	OK(tailnode_accept(ln, 0, &stuck_peer, NULL, NULL, &err));
	static char block[1 << 16];
	struct pollfd w = {.fd = stuck, .events = POLLOUT};
	do
		while (send(stuck, block, sizeof block, MSG_NOSIGNAL) > 0)
			;
	while (poll(&w, 1, 300) == 1);
	// A listener that nobody accepts from, with more connections than its socket takes.
	OK(tailnode_listen(a, "tcp", ":0", 0, &quiet, &bound, &err));
	char addr[64];
	snprintf(addr, sizeof addr, "cclosea:%d", bound.port);
	static int waiting[300];
	for (int i = 0; i < 300; i++)
		OK(tailnode_dial(b, "tcp", addr, 0, 30000, &waiting[i], NULL, NULL, &err));
	// UDP of both kinds, a watch that is not read, an operation that is not taken, and one under way.
	int udp, connected, watch;
	OK(tailnode_listen_packet(a, "udp", ":0", 0, &udp, &any, &err));
	OK(tailnode_dial(a, "udp", "gopeer:7", 0, 30000, &connected, NULL, NULL, &err));
	OK(tailnode_watch(a, 0, &watch, &err));
	tailnode_op done, pending;
	OK(tailnode_status_start(a, 1, &done, &err));
	wait_in(tailnode_op_fd(done), 30000);
	OK(tailnode_dial_start(a, "tcp", "100.127.3.4:80", 0, TAILNODE_FOREVER, &pending, &err));

	OK(tailnode_close(a, &err));

	CHECK(end_of(peer_done) == ECONNRESET || send(peer_done, "x", 1, MSG_NOSIGNAL) < 0);
	CHECK(send(peer_done, "x", 1, MSG_NOSIGNAL) < 0 && errno == EPIPE);
	end_of(unread);
	CHECK(end_of(host_done) == ECONNRESET);
	CHECK(end_of(idle) == ECONNRESET);
	CHECK(end_of(full) == ECONNRESET);
	CHECK(fcntl(stuck, F_SETFL, 0) == 0 && end_of(stuck) == ECONNRESET);
	// The other node's end learns it: as with TCP, after the end of file by writing.
	for (int i = 0; send(peer, "x", 1, MSG_NOSIGNAL) == 1; i++) {
		CHECK(i < 30000);
		poll(NULL, 0, 1);
	}
	CHECK(errno == ECONNRESET || errno == EPIPE);
	int code, n = 0;
	while ((code = tailnode_accept(quiet, 0, &c, NULL, NULL, &err)) == 0) {
		CHECK(end_of(c) == ECONNRESET && ++n <= 300);
		close(c);
	}
	WANT(code, TAILNODE_CLOSED);
	char buf[64];
	size_t len;
	WANT(tailnode_recvfrom(udp, buf, sizeof buf, &len, &any, &err), TAILNODE_CLOSED);
	CHECK(recv(connected, buf, sizeof buf, 0) <= 0);
	tailnode_event ev;
	while ((code = tailnode_read_event(watch, &ev, &err)) == 0)
		;
	WANT(code, TAILNODE_CLOSED);
	tailnode_result r = {.size = sizeof r};
	OK(tailnode_op_take(done, &r, &err));
	tailnode_free(r.data);
	WANT(tailnode_op_wait(pending, 30000, NULL, &err), TAILNODE_CLOSED);
	OK(tailnode_close(b, &err));
	printf("closing: ok\n");
	return 0;
}
