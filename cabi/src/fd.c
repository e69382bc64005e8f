// fd.c - what is read from the descriptors that the library gives out, and the thread for callbacks.
#include "internal.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/uio.h>

static int fd_error(const char *call, int e, tailnode_error *err) {
	switch (e) {
	case EAGAIN:
		return tn_fail(err, TAILNODE_PENDING, e, "tailnode: %s: nothing there yet", call);
	case EBADF:
	case ENOTSOCK:
	case EINVAL:
	case EFAULT:
		return tn_fail(err, TAILNODE_INVALID_ARGUMENT, e, "tailnode: %s: %s", call, strerror(e));
	case ECONNRESET:
	case EPIPE:
	case ENOTCONN:
		return tn_fail(err, TAILNODE_CLOSED, e, "tailnode: %s: the node is closed", call);
	case EMFILE:
	case ENFILE:
	case ENOMEM:
	case ENOBUFS:
		return tn_fail(err, TAILNODE_EXHAUSTED, e, "tailnode: %s: %s", call, strerror(e));
	}
	return tn_fail(err, TAILNODE_INVALID_ARGUMENT, e, "tailnode: %s: %s", call, strerror(e));
}

int tailnode_accept(int listener, uint32_t flags, int *fd, tailnode_addr *remote, tailnode_addr *local, tailnode_error *err) {
	CHECK_FORK(err);
	if (!fd || (flags & ~TAILNODE_NONBLOCK))
		return tn_fail(err, TAILNODE_INVALID_ARGUMENT, 0, "tailnode: accept: %s", fd ? "this flag does not exist" : "there is no place for the descriptor");
	tailnode_accepted m;
	int conn = -1;
	ssize_t n = tn_recv_fd(listener, &m, sizeof m, 0, &conn);
	if (n < 0)
		return fd_error("accept", errno, err);
	if (n == 0)
		return tn_fail(err, TAILNODE_CLOSED, 0, "tailnode: accept: the listener is closed");
	if (n != (ssize_t)sizeof m || m.magic != TAILNODE_ACCEPTED_MAGIC) {
		if (conn >= 0)
			close(conn);
		return tn_fail(err, TAILNODE_INVALID_ARGUMENT, 0, "tailnode: accept: this descriptor is not a listener");
	}
	if (conn < 0) // the kernel drops a descriptor for which there is no room
		return tn_fail(err, TAILNODE_EXHAUSTED, EMFILE, "tailnode: accept: too many open files; the connection was closed");
	if ((flags & TAILNODE_NONBLOCK) && fcntl(conn, F_SETFL, fcntl(conn, F_GETFL) | O_NONBLOCK) < 0) {
		int e = errno;
		close(conn);
		return fd_error("accept", e, err);
	}
	*fd = conn;
	if (remote)
		*remote = m.remote;
	if (local)
		*local = m.local;
	return tn_ok(err);
}

int tailnode_recvfrom(int fd, void *buf, size_t size, size_t *len, tailnode_addr *from, tailnode_error *err) {
	CHECK_FORK(err);
	if ((!buf && size) || !len)
		return tn_fail(err, TAILNODE_INVALID_ARGUMENT, 0, "tailnode: recvfrom: a buffer or a place for the length is missing");
	tailnode_addr a;
	struct iovec iov[2] = {{&a, sizeof a}, {buf, size}};
	struct msghdr mh = {.msg_iov = iov, .msg_iovlen = 2};
	ssize_t n;
	do
		n = recvmsg(fd, &mh, 0);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		return fd_error("recvfrom", errno, err);
	if (n == 0)
		return tn_fail(err, TAILNODE_CLOSED, 0, "tailnode: recvfrom: the node is closed");
	if (n < (ssize_t)sizeof a)
		return tn_fail(err, TAILNODE_INVALID_ARGUMENT, 0, "tailnode: recvfrom: this descriptor is not of tailnode_listen_packet");
	*len = (size_t)n - sizeof a;
	if (from)
		*from = a;
	return tn_ok(err);
}

int tailnode_sendto(int fd, const void *buf, size_t len, const tailnode_addr *to, tailnode_error *err) {
	CHECK_FORK(err);
	if ((!buf && len) || !to || (to->family != 4 && to->family != 6) || !to->port || len > 65507)
		return tn_fail(err, TAILNODE_INVALID_ARGUMENT, 0, "tailnode: sendto: %s",
		               len > 65507 ? "the datagram is too long" : "the datagram or its address is missing");
	struct iovec iov[2] = {{(void *)(uintptr_t)to, sizeof *to}, {(void *)(uintptr_t)buf, len}};
	struct msghdr mh = {.msg_iov = iov, .msg_iovlen = 2};
	ssize_t n;
	do
		n = sendmsg(fd, &mh, MSG_NOSIGNAL);
	while (n < 0 && errno == EINTR);
	return n < 0 ? fd_error("sendto", errno, err) : tn_ok(err);
}

int tailnode_read_event(int fd, tailnode_event *out, tailnode_error *err) {
	CHECK_FORK(err);
	if (!out)
		return tn_fail(err, TAILNODE_INVALID_ARGUMENT, 0, "tailnode: read_event: there is no place for the event");
	tailnode_event ev;
	memset(&ev, 0, sizeof ev);
	ssize_t n;
	do
		n = recv(fd, &ev, sizeof ev - 1, 0);
	while (n < 0 && errno == EINTR);
	if (n < 0 && errno == ECONNRESET)
		return tn_fail(err, TAILNODE_CORE_LOST, errno, "tailnode: the process that ran the node has ended");
	if (n < 0)
		return fd_error("read_event", errno, err);
	if (n == 0)
		return tn_fail(err, TAILNODE_CLOSED, 0, "tailnode: the node is closed");
	size_t head = offsetof(tailnode_event, text);
	if ((size_t)n < head || ev.text_len != (size_t)n - head)
		return tn_fail(err, TAILNODE_INVALID_ARGUMENT, 0, "tailnode: read_event: this descriptor is not of tailnode_watch");
	*out = ev;
	return tn_ok(err);
}

// ---- addresses as text ----

int tailnode_addr_format(const tailnode_addr *a, char *buf, size_t size) {
	char ip[INET6_ADDRSTRLEN];
	if (!a || !buf || (a->family != 4 && a->family != 6) || !inet_ntop(a->family == 4 ? AF_INET : AF_INET6, a->ip, ip, sizeof ip))
		return TAILNODE_INVALID_ARGUMENT;
	int n;
	if (!a->port)
		n = snprintf(buf, size, "%s", ip);
	else
		n = snprintf(buf, size, a->family == 4 ? "%s:%u" : "[%s]:%u", ip, a->port);
	return n < 0 || (size_t)n >= size ? TAILNODE_EXHAUSTED : 0;
}

int tailnode_addr_parse(const char *text, tailnode_addr *out) {
	if (!text || !out || strlen(text) >= TAILNODE_ADDR_TEXT)
		return TAILNODE_INVALID_ARGUMENT;
	char ip[TAILNODE_ADDR_TEXT];
	strcpy(ip, text);
	char *port = NULL;
	char *host = ip;
	if (*ip == '[') {
		char *end = strchr(ip, ']');
		if (!end)
			return TAILNODE_INVALID_ARGUMENT;
		*end = 0;
		host = ip + 1;
		if (end[1] == ':')
			port = end + 2;
		else if (end[1])
			return TAILNODE_INVALID_ARGUMENT;
	} else {
		char *colon = strchr(ip, ':');
		if (colon && !strchr(colon + 1, ':')) {
			*colon = 0;
			port = colon + 1;
		}
	}
	tailnode_addr a;
	memset(&a, 0, sizeof a);
	if (port) {
		unsigned long v = 0;
		if (!*port)
			return TAILNODE_INVALID_ARGUMENT;
		for (const char *p = port; *p; p++) {
			if (*p < '0' || *p > '9' || (v = v * 10 + (unsigned)(*p - '0')) > 65535)
				return TAILNODE_INVALID_ARGUMENT;
		}
		a.port = (uint16_t)v;
	}
	if (inet_pton(AF_INET, host, a.ip) == 1)
		a.family = 4;
	else if (inet_pton(AF_INET6, host, a.ip) == 1)
		a.family = 6;
	else
		return TAILNODE_INVALID_ARGUMENT;
	*out = a;
	return 0;
}

// ---- callbacks ----

enum { FRAME_LOG = 1, FRAME_AUTH_URL = 2 };

struct callbacks {
	pthread_t thread;
	int refs; // atomic: the thread and the node
	int fd;
	struct callbacks *before; // of the core before, whose last ones may still run
	void (*log)(void *, int, const char *, size_t);
	void (*auth_url)(void *, const char *);
	void *user;
	pthread_mutex_t mu; // guards what follows
	bool ended, over;   // there are no more, and that is told
	struct op *closing; // the operation that waits for that
};

static void callbacks_unref(struct callbacks *c) {
	if (__atomic_sub_fetch(&c->refs, 1, __ATOMIC_ACQ_REL) == 0) {
		pthread_mutex_destroy(&c->mu);
		close(c->fd);
		free(c);
	}
}

static void *run(void *p) {
	struct callbacks *c = p;
	struct {
		uint32_t type;
		int32_t level;
		char text[16 << 10];
	} m;
	const size_t head = offsetof(__typeof__(m), text);
	if (c->before)
		tn_callbacks_join(c->before);
	for (;;) {
		ssize_t n = recv(c->fd, &m, sizeof m - 1, 0);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			break;
		if ((size_t)n < head)
			continue;
		size_t len = (size_t)n - head;
		m.text[len] = 0;
		if (m.type == FRAME_LOG && c->log)
			c->log(c->user, m.level, m.text, len);
		else if (m.type == FRAME_AUTH_URL && c->auth_url)
			c->auth_url(c->user, m.text);
	}
	pthread_mutex_lock(&c->mu);
	c->ended = true;
	struct op *op = c->closing;
	pthread_mutex_unlock(&c->mu);
	if (op)
		tn_op_await_reply(op);
	pthread_mutex_lock(&c->mu);
	c->over = true;
	pthread_mutex_unlock(&c->mu);
	if (op)
		tn_op_ready(op);
	callbacks_unref(c);
	return NULL;
}

int tn_callbacks_start(struct node *n, int fd, struct callbacks *before, struct callbacks **out) {
	struct callbacks *c = calloc(1, sizeof *c);
	if (!c)
		return ENOMEM;
	*c = (struct callbacks){.refs = 2, .fd = fd, .before = before, .log = n->log, .auth_url = n->auth_url, .user = n->user};
	sigset_t all, old;
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &old);
	pthread_mutex_init(&c->mu, NULL);
	int e = pthread_create(&c->thread, NULL, run, c);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (e) {
		pthread_mutex_destroy(&c->mu);
		free(c);
		return e;
	}
	*out = c;
	return 0;
}

void tn_callbacks_release(struct callbacks *c) {
	pthread_detach(c->thread);
	callbacks_unref(c);
}

bool tn_callbacks_closing(struct callbacks *c, struct op *op) {
	pthread_mutex_lock(&c->mu);
	bool ended = c->ended;
	if (!ended) {
		tn_ref(op);
		c->closing = op;
	}
	pthread_mutex_unlock(&c->mu);
	return !ended;
}

bool tn_callbacks_over(struct callbacks *c) {
	pthread_mutex_lock(&c->mu);
	bool over = c->over || (c->ended && !c->closing);
	pthread_mutex_unlock(&c->mu);
	return over || tn_callbacks_here(c);
}

bool tn_callbacks_here(struct callbacks *c) { return pthread_equal(c->thread, pthread_self()); }

void tn_callbacks_join(struct callbacks *c) {
	if (tn_callbacks_here(c)) {
		tn_callbacks_release(c);
		return;
	}
	shutdown(c->fd, SHUT_RDWR); // what is queued is still read
	pthread_join(c->thread, NULL);
	callbacks_unref(c);
}
