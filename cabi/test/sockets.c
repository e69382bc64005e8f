// sockets.c - that the descriptors behave like the sockets that they stand for.
#include "check.h"

static tailnode_node a, b;

static void join(const char *addr, int ln, int *conn, int *peer) {
	OK(tailnode_dial(a, "tcp", addr, 0, 30000, conn, NULL, NULL, &err));
	OK(tailnode_accept(ln, 0, peer, NULL, NULL, &err));
}

static int drained(int fd) { // reads to the end; 0: end of file, else the errno
	char buf[4096];
	ssize_t n;
	while ((n = read(fd, buf, sizeof buf)) > 0)
		;
	return n == 0 ? 0 : errno;
}

static void *writer(void *p) {
	int fd = *(int *)p;
	static char buf[1 << 16];
	for (int i = 0; i < 1024; i++) // 64 MB
		write_all(fd, buf, sizeof buf);
	CHECK(shutdown(fd, SHUT_WR) == 0);
	return NULL;
}

static void bulk(int ln) {
	for (int way = 0; way < 2; way++) {
		int c, p;
		join("cbeta:80", ln, &c, &p);
		int from = way ? p : c, to = way ? c : p;
		pthread_t t;
		CHECK(pthread_create(&t, NULL, writer, &from) == 0);
		static char buf[1 << 18];
		size_t total = 0;
		ssize_t n;
		while ((n = read(to, buf, sizeof buf)) > 0)
			total += (size_t)n;
		CHECK(n == 0 && total == (size_t)64 << 20);
		pthread_join(t, NULL);
		write_all(to, "thanks", 6);
		char back[6];
		read_all(from, back, 6);
		close(c);
		CHECK(drained(p) == 0);
		close(p);
	}
}

static void resets(int ln) {
	int c, p;
	char buf[8];
	// Unread data at close resets, as with TCP.
	join("cbeta:80", ln, &c, &p);
	write_all(c, "x", 1);
	read_all(p, buf, 1);
	write_all(c, "unread", 6);
	wait_in(p, 30000);
	close(p);
	CHECK(drained(c) == ECONNRESET);
	CHECK(send(c, "x", 1, MSG_NOSIGNAL) < 0 && errno == EPIPE);
	close(c);
	// A reset after data: the data comes first.
	OK(tailnode_dial(a, "tcp", "gopeer:13", 0, 30000, &c, NULL, NULL, &err));
	write_all(c, "x", 1);
	CHECK(drained(c) == ECONNRESET);
	close(c);
	// A clean end after both halves is none, and neither is one without any data.
	join("cbeta:80", ln, &c, &p);
	close(c);
	CHECK(drained(p) == 0);
	close(p);
	join("cbeta:80", ln, &c, &p);
	write_all(c, "abc", 3);
	read_all(p, buf, 3);
	CHECK(shutdown(p, SHUT_WR) == 0 && shutdown(c, SHUT_WR) == 0);
	CHECK(drained(c) == 0 && drained(p) == 0);
	close(c);
	close(p);
}

// What a listener still holds when it is closed ends with it: by a FIN, or by a reset where it was in the stack yet. What was accepted and is closed
// at once ends with a FIN, always.
static void unaccepted(void) {
	int ln, waiting[3], c, p;
	tailnode_addr bound;
	char to[32];
	OK(tailnode_listen(b, "tcp", ":0", 0, &ln, &bound, &err));
	snprintf(to, sizeof to, "cbeta:%d", bound.port);
	join(to, ln, &c, &p);
	for (int i = 0; i < 3; i++)
		OK(tailnode_dial(a, "tcp", to, 0, 30000, &waiting[i], NULL, NULL, &err));
	wait_in(ln, 30000);
	close(ln);
	close(p);
	CHECK(drained(c) == 0);
	close(c);
	for (int i = 0; i < 3; i++) {
		int e = drained(waiting[i]);
		CHECK(e == 0 || e == ECONNRESET);
		close(waiting[i]);
	}
}

// A host that does not read stops the peer; one that is not read from is stopped.
static void pressure(int ln) {
	int c, p;
	join("cbeta:80", ln, &c, &p);
	CHECK(fcntl(c, F_SETFL, fcntl(c, F_GETFL) | O_NONBLOCK) == 0);
	static char buf[1 << 16];
	size_t sent = 0, got = 0;
	for (;;) {
		ssize_t n = send(c, buf, sizeof buf, MSG_NOSIGNAL);
		if (n > 0) {
			sent += (size_t)n;
			CHECK(sent < (size_t)64 << 20);
			continue;
		}
		CHECK(errno == EAGAIN);
		struct pollfd w = {.fd = c, .events = POLLOUT};
		if (poll(&w, 1, 300) == 0) // nothing moves any more: TCP's and the sockets' buffers are full
			break;
	}
	CHECK(shutdown(c, SHUT_WR) == 0);
	ssize_t n;
	while ((n = read(p, buf, sizeof buf)) > 0)
		got += (size_t)n;
	CHECK(n == 0 && got == sent);
	close(c);
	close(p);
}

static void nonblocking(void) {
	int ln, c, p;
	OK(tailnode_listen(b, "tcp", ":81", TAILNODE_NONBLOCK, &ln, NULL, &err));
	WANT(tailnode_accept(ln, 0, &p, NULL, NULL, &err), TAILNODE_PENDING);
	CHECK(err.sys_errno == EAGAIN);
	OK(tailnode_dial(a, "tcp4", "cbeta:81", TAILNODE_NONBLOCK, 30000, &c, NULL, NULL, &err));
	wait_in(ln, 30000);
	tailnode_addr remote;
	OK(tailnode_accept(ln, 0, &p, &remote, NULL, &err));
	CHECK(remote.family == 4);
	char x;
	CHECK(read(c, &x, 1) < 0 && errno == EAGAIN);
	CHECK(read(p, &x, 1) < 0 && errno == EAGAIN);
	close(p);
	wait_in(c, 30000);
	CHECK(read(c, &x, 1) == 0);
	close(c);
	// A listener that is closed refuses, from a moment later on.
	close(ln);
	for (;;) {
		int code = tailnode_dial(a, "tcp4", "cbeta:81", 0, 30000, &c, NULL, NULL, &err);
		if (code == TAILNODE_REFUSED)
			break;
		if (code == TAILNODE_RESET) // it was let in by a listener that closed in that moment
			continue;
		OK(code);
		close(c);
	}
}

static void datagrams(void) {
	int u, d;
	tailnode_addr bound, to, from;
	OK(tailnode_listen_packet(a, "udp4", ":0", 0, &u, &bound, &err));
	CHECK(bound.port != 0);
	OK(tailnode_dial(a, "udp4", "gopeer:7", 0, 30000, &d, NULL, &to, &err));
	static char out[1200], in[2000];
	for (size_t size = 0; size <= sizeof out; size += 400) {
		// Connected: one datagram is one message. It may be lost, and one that was sent before may be late.
		size_t n = 1;
		while (n != size) {
			CHECK(send(d, out, size, MSG_NOSIGNAL) == (ssize_t)size);
			struct pollfd p = {.fd = d, .events = POLLIN};
			if (poll(&p, 1, 1000) != 1)
				continue;
			n = (size_t)recv(d, in, sizeof in, 0);
			CHECK(n <= size && n % 400 == 0);
		}
		// With addresses.
		for (n = 1; n != size;) {
			OK(tailnode_sendto(u, out, size, &to, &err));
			struct pollfd p = {.fd = u, .events = POLLIN};
			if (poll(&p, 1, 1000) != 1)
				continue;
			OK(tailnode_recvfrom(u, in, sizeof in, &n, &from, &err));
			CHECK(n <= size && n % 400 == 0 && !memcmp(&from, &to, sizeof to));
		}
	}
	// A port that nobody has: ICMP says so, and the socket serves on, both ways.
	int away, back;
	tailnode_addr at, from2;
	size_t n;
	OK(tailnode_dial(a, "udp4", "cbeta:82", 0, 30000, &away, &at, NULL, &err));
	for (int i = 0; i < 20; i++) {
		CHECK(send(away, "nobody", 6, MSG_NOSIGNAL) == 6);
		WANT(tailnode_dial(a, "tcp4", "cbeta:83", 0, 30000, &back, NULL, NULL, &err), TAILNODE_REFUSED); // it takes the same way, after it
	}
	struct pollfd p = {.fd = away, .events = POLLIN};
	OK(tailnode_listen_packet(b, "udp4", ":82", TAILNODE_NONBLOCK, &back, NULL, &err));
	do // what ICMP says may still be under way
		CHECK(send(away, "served", 6, MSG_NOSIGNAL) == 6);
	while (poll(&(struct pollfd){.fd = back, .events = POLLIN}, 1, 100) == 0);
	OK(tailnode_recvfrom(back, in, sizeof in, &n, &from2, &err));
	CHECK(n == 6 && from2.port == at.port);
	do
		OK(tailnode_sendto(back, "answer", 6, &from2, &err));
	while (poll(&p, 1, 1000) == 0);
	CHECK(recv(away, in, sizeof in, 0) == 6 && !memcmp(in, "answer", 6));
	close(away);
	close(back);

	// What was sent before a close arrives, also after empty datagrams; one or the other may be lost or late, as with UDP.
	int lost = 0;
	OK(tailnode_listen_packet(b, "udp4", ":84", TAILNODE_NONBLOCK, &back, NULL, &err));
	for (int i = 0; i < 20; i++) {
		char last[8];
		OK(tailnode_dial(a, "udp4", "cbeta:84", 0, 30000, &away, NULL, NULL, &err));
		for (int j = 0; j < 1 + i % 3; j++)
			CHECK(send(away, "", 0, MSG_NOSIGNAL) == 0);
		snprintf(last, sizeof last, "last %02d", i);
		CHECK(send(away, last, 7, MSG_NOSIGNAL) == 7);
		close(away);
		do {
			if (poll(&(struct pollfd){.fd = back, .events = POLLIN}, 1, 10000) == 0) {
				CHECK(++lost < 4);
				break;
			}
			OK(tailnode_recvfrom(back, in, sizeof in, &n, &from2, &err));
		} while (n != 7 || memcmp(in, last, 7));
	}
	close(back);

	to.family = 9;
	WANT(tailnode_sendto(u, "x", 1, &to, &err), TAILNODE_INVALID_ARGUMENT);
	close(u);
	close(d);
}

int main(void) {
	alarm(180);
	a = up("calpha");
	b = up("cbeta");
	int ln, c, p;
	OK(tailnode_listen(b, "tcp", ":80", 0, &ln, NULL, &err));
	bulk(ln);
	resets(ln);
	unaccepted();
	pressure(ln);
	nonblocking();
	datagrams();

	// The end of a node is a reset for its connections and the end for its listeners.
	join("cbeta:80", ln, &c, &p);
	OK(tailnode_close(b, &err));
	CHECK(drained(p) == ECONNRESET);
	WANT(tailnode_accept(ln, 0, &p, NULL, NULL, &err), TAILNODE_CLOSED);
	close(c);
	close(p);
	close(ln);
	OK(tailnode_close(a, &err));
	printf("sockets: ok\n");
	return 0;
}
