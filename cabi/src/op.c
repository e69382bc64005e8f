// op.c - one call to the core: a request with one end of a socket pair, on which the result comes. The other end is
// the operation's descriptor; closing it cancels the call.
#include "internal.h"

#include <limits.h>
#include <poll.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

// ---- packing ----

int tn_pack(char **out, size_t *len, uint64_t number, const struct args *a, tailnode_error *err) {
	struct request rq = {.magic = REQUEST_MAGIC, .kind = a->kind, .node = number, .timeout_ms = a->timeout_ms, .strings = (uint32_t)a->strings};
	size_t n = sizeof rq;
	for (int i = 0; i < a->strings; i++) {
		size_t l = a->str[i] ? strnlen(a->str[i], MAX_REQUEST) : 0;
		n += l;
		if (n > MAX_REQUEST)
			return tn_fail(err, TAILNODE_INVALID_ARGUMENT, E2BIG, "tailnode: the strings of this call are longer than %d bytes", MAX_REQUEST);
		rq.len[i] = (uint32_t)l;
	}
	memcpy(rq.arg, a->arg, sizeof rq.arg);
	char *p = malloc(n);
	if (!p)
		return tn_fail(err, TAILNODE_EXHAUSTED, ENOMEM, "tailnode: out of memory");
	memcpy(p, &rq, sizeof rq);
	size_t at = sizeof rq;
	for (int i = 0; i < a->strings; i++) {
		if (rq.len[i])
			memcpy(p + at, a->str[i], rq.len[i]);
		at += rq.len[i];
	}
	*out = p;
	*len = n;
	return 0;
}

// ---- nodes and their cores ----

// Gives n a core, with n->attaching held. The first message is K_NEW.
static int attach(struct node *n, tailnode_error *err) {
	pthread_mutex_lock(&n->mu);
	bool closing = n->closing;
	pthread_mutex_unlock(&n->mu);
	if (closing || !n->open_msg)
		return tn_fail(err, TAILNODE_CLOSED, 0, "tailnode: the node is closed");
	struct core *c = NULL;
	int code = n->mode == TAILNODE_ISOLATED ? tn_core_spawn(n->helper_path, &c, err) : tn_core_in_process(&c, err);
	if (code)
		return code;
	int fds[2], nfds = 0, pair[2] = {-1, -1}, e = 0;
	if (n->log || n->auth_url) {
		struct callbacks *cb = NULL;
		e = socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0 ? errno : 0;
		pthread_mutex_lock(&n->mu);
		closing = n->closing; // since then: a close takes the callbacks that it is to wait for, and only once
		if (!e && !closing)
			e = tn_callbacks_start(n, pair[0], n->callbacks, &cb);
		if (!e && !closing)
			n->callbacks = cb;
		pthread_mutex_unlock(&n->mu);
		if (e || closing) {
			if (pair[0] >= 0) {
				close(pair[0]);
				close(pair[1]);
			}
			tn_core_unref(c);
			if (closing)
				return tn_fail(err, TAILNODE_CLOSED, 0, "tailnode: the node is closed");
			return tn_fail(err, TAILNODE_EXHAUSTED, e, "tailnode: the thread for callbacks cannot be started: %s", strerror(e));
		}
		fds[nfds++] = pair[1];
	}
	if (n->log_fd >= 0)
		fds[nfds++] = n->log_fd;
	e = tn_core_send(c, n->open_msg, n->open_len, fds, nfds, true);
	if (pair[1] >= 0)
		close(pair[1]); // on failure the thread for callbacks finds its end, and is the next one's to wait for
	if (e) {
		tn_core_unref(c);
		return tn_fail(err, TAILNODE_CORE_LOST, e, "tailnode: the core does not take requests: %s", strerror(e));
	}
	pthread_mutex_lock(&n->mu);
	n->core = c;
	bool keep = n->mode == TAILNODE_ISOLATED && (n->flags & TAILNODE_RESTART);
	pthread_mutex_unlock(&n->mu);
	if (!keep) {
		explicit_bzero(n->open_msg, n->open_len);
		free(n->open_msg);
		n->open_msg = NULL;
	}
	return 0;
}

static struct core *core_now(struct node *n) { // with a reference, or NULL
	pthread_mutex_lock(&n->mu);
	struct core *c = n->core;
	if (c)
		__atomic_add_fetch(&c->refs, 1, __ATOMIC_RELAXED);
	pthread_mutex_unlock(&n->mu);
	return c;
}

static int core_of(struct node *n, struct core **out, tailnode_error *err) { // waits until there is one
	int code = 0;
	if ((*out = core_now(n)))
		return 0;
	pthread_mutex_lock(&n->attaching);
	if (!(*out = core_now(n)) && !(code = attach(n, err)))
		*out = core_now(n);
	pthread_mutex_unlock(&n->attaching);
	if (!code && !*out) // it ended in between, and somebody saw it first
		code = tn_fail(err, TAILNODE_CORE_LOST, 0, "tailnode: the process that ran the node has ended");
	return code;
}

#define NO_CORE (-1) // what may not wait would have to

static int send_on(struct node *n, enum kind kind, const char *msg, size_t len, int fd, bool wait, tailnode_error *err) {
	for (int attempt = 0;; attempt++) {
		struct core *c;
		if (!wait || kind == K_CLOSE) { // nothing is started only to be closed
			if (wait)
				pthread_mutex_lock(&n->attaching);
			c = core_now(n);
			if (wait)
				pthread_mutex_unlock(&n->attaching);
			if (!c)
				return NO_CORE;
		} else {
			int code = core_of(n, &c, err);
			if (code)
				return code;
		}
		int e = tn_core_send(c, msg, len, &fd, 1, wait);
		bool again = false;
		if (e == EPIPE || e == ECONNRESET || e == ENOTCONN) {
			pthread_mutex_lock(&n->mu);
			if (n->mode == TAILNODE_ISOLATED && (n->flags & TAILNODE_RESTART) && attempt == 0) {
				again = true;
				if (n->core == c) { // else another thread was first
					n->core = NULL;
					tn_core_unref(c);
				}
			}
			pthread_mutex_unlock(&n->mu);
		}
		tn_core_unref(c);
		if (!e)
			return 0;
		if (again)
			continue;
		switch (e) {
		case EAGAIN:
			return tn_fail(err, TAILNODE_EXHAUSTED, e, "tailnode: the core has not yet taken the requests before this one");
		case ETOOMANYREFS:
		case ENOBUFS:
		case ENOMEM:
			return tn_fail(err, TAILNODE_EXHAUSTED, e, "tailnode: the request cannot be sent: %s", strerror(e));
		}
		return tn_fail(err, TAILNODE_CORE_LOST, e, "tailnode: the process that ran the node has ended: %s", strerror(e));
	}
}

// ---- calls that may not wait for a core to start ----

struct deferred {
	struct deferred *next;
	enum kind kind;
	char *msg;
	size_t len;
	int fd; // the core's end of the operation
};

#define MAX_DEFERRED 256

// Answers in place of the core.
static void answer(int fd, int code, const tailnode_error *err) {
	struct {
		struct reply head;
		char text[sizeof err->message];
	} m = {.head = {.magic = REPLY_MAGIC, .code = code}};
	if (code) {
		m.head.sys_errno = err->sys_errno;
		m.head.data_len = (uint32_t)strlen(err->message);
		memcpy(m.text, err->message, m.head.data_len);
	}
	(void)!send(fd, &m, sizeof m.head + m.head.data_len, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static void *send_deferred(void *p) {
	struct node *n = p;
	for (;;) {
		pthread_mutex_lock(&n->mu);
		struct deferred *d = n->first;
		if (d) {
			n->deferred--;
			if (!(n->first = d->next))
				n->last = &n->first;
		} else {
			n->working = false;
		}
		pthread_mutex_unlock(&n->mu);
		if (!d)
			break;
		tailnode_error err;
		int code = send_on(n, d->kind, d->msg, d->len, d->fd, true, &err);
		if (code)
			answer(d->fd, code == NO_CORE ? 0 : code, &err);
		close(d->fd);
		explicit_bzero(d->msg, d->len);
		free(d->msg);
		free(d);
	}
	tn_unref(n);
	return NULL;
}

// Sends without waiting, or has it sent. On success msg and fd are taken over.
static int send_soon(struct node *n, enum kind kind, char *msg, size_t len, int fd, tailnode_error *err) {
	pthread_mutex_lock(&n->mu);
	bool behind = n->working; // the order of a node's requests is kept
	pthread_mutex_unlock(&n->mu);
	if (!behind) {
		int code = send_on(n, kind, msg, len, fd, false, err);
		if (code == 0) {
			close(fd);
			free(msg);
		}
		if (code != NO_CORE)
			return code;
	}
	struct deferred *d = calloc(1, sizeof *d);
	if (!d)
		return tn_fail(err, TAILNODE_EXHAUSTED, ENOMEM, "tailnode: out of memory");
	*d = (struct deferred){.kind = kind, .msg = msg, .len = len, .fd = fd};
	pthread_mutex_lock(&n->mu);
	int code = 0;
	if (n->deferred >= MAX_DEFERRED) {
		code = tn_fail(err, TAILNODE_EXHAUSTED, EAGAIN, "tailnode: the core has not started yet, and %d requests wait for it", MAX_DEFERRED);
	} else if (!n->working) {
		tn_ref(n);
		int e = tn_detached(send_deferred, n);
		if (e) {
			tn_unref(n); // never the last: the caller has one
			code = tn_fail(err, TAILNODE_EXHAUSTED, e, "tailnode: the thread that starts the core cannot be made: %s", strerror(e));
		}
	}
	if (!code) {
		n->working = true;
		n->deferred++;
		*n->last = d;
		n->last = &d->next;
	}
	pthread_mutex_unlock(&n->mu);
	if (code)
		free(d);
	return code;
}

// ---- operations ----

static void op_destroy(void *p) {
	struct op *op = p;
	if (op->reply >= 0 && op->reply != op->fd)
		close(op->reply);
	if (op->fd >= 0)
		close(op->fd);
	if (op->passed >= 0)
		close(op->passed);
	free(op->data);
	if (op->callbacks)
		tn_callbacks_release(op->callbacks);
	pthread_mutex_destroy(&op->mu);
	free(op);
}

int tn_start_op_on(struct node *n, const struct args *a, bool wait, struct op **out, tailnode_error *err) {
	char *msg;
	size_t len;
	int code = tn_pack(&msg, &len, n->number, a, err);
	if (code)
		return code;
	struct op *op = calloc(1, sizeof *op);
	if (!op) {
		free(msg);
		return tn_fail(err, TAILNODE_EXHAUSTED, ENOMEM, "tailnode: out of memory");
	}
	pthread_mutex_init(&op->mu, NULL);
	op->o = (struct object_header){.type = O_OP, .refs = 1, .destroy = op_destroy};
	op->fd = op->reply = op->passed = -1;
	op->isolated = n->mode == TAILNODE_ISOLATED;
	op->wants_fd = a->kind == K_DIAL || a->kind == K_LISTEN || a->kind == K_LISTEN_PACKET || a->kind == K_WATCH;
	op->prefix = a->kind == K_STATS || a->kind == K_LOOPBACK ? sizeof(size_t) : 0;
	int pair[2];
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair) < 0) {
		code = tn_fail(err, TAILNODE_EXHAUSTED, errno, "tailnode: socketpair: %s", strerror(errno));
	} else {
		op->fd = op->reply = pair[0];
		if (!wait) {
			code = send_soon(n, a->kind, msg, len, pair[1], err);
			if (!code)
				msg = NULL;
			else
				close(pair[1]);
		} else {
			code = send_on(n, a->kind, msg, len, pair[1], true, err);
			if (code == NO_CORE) { // closed before it began
				answer(pair[1], 0, NULL);
				code = 0;
			}
			close(pair[1]);
		}
	}
	free(msg);
	if (code)
		tn_unref(op);
	else
		*out = op;
	return code;
}

int tn_start_op(uint64_t id, const struct args *a, bool wait, struct op **out, tailnode_error *err) {
	CHECK_FORK(err);
	int code = 0;
	struct node *n = tn_handle_get(id, O_NODE, &code);
	if (!n)
		return tn_fail(err, code, 0, code == TAILNODE_CLOSED ? "tailnode: the node is closed" : "tailnode: this is not the handle of a node");
	code = tn_start_op_on(n, a, wait, out, err);
	tn_unref(n);
	return code;
}

// Reads what has come, with op->mu held. Returns 0 when all is there, EAGAIN, or another errno; ENODATA: the other end is gone.
static int fill(struct op *op) {
	for (;;) {
		void *at;
		size_t want;
		if (op->got < sizeof op->head) {
			at = (char *)&op->head + op->got;
			want = sizeof op->head - op->got;
		} else {
			size_t have = op->got - sizeof op->head;
			if (!op->data) {
				if (op->head.magic != REPLY_MAGIC || op->head.data_len > MAX_REPLY)
					return EPROTO;
				op->data = malloc(op->prefix + (size_t)op->head.data_len + 1);
				if (!op->data)
					return ENOMEM;
			}
			if (have == op->head.data_len) {
				op->data[op->prefix + have] = 0;
				return 0;
			}
			at = op->data + op->prefix + have;
			want = op->head.data_len - have;
		}
		ssize_t n = tn_recv_fd(op->reply, at, want, MSG_DONTWAIT, &op->passed);
		if (n < 0)
			return errno == EWOULDBLOCK ? EAGAIN : errno;
		if (n == 0)
			return ENODATA;
		op->got += (size_t)n;
	}
}

void tn_op_await_reply(struct op *op) {
	struct pollfd p = {.fd = op->reply, .events = POLLIN};
	while (poll(&p, 1, -1) < 0 && errno == EINTR)
		;
}

void tn_op_ready(struct op *op) {
	(void)!eventfd_write(op->fd, 1);
	tn_unref(op);
}

// Turns a complete op into the call's result. With op->mu held.
static int deliver(struct op *op, int e, tailnode_result *out, tailnode_error *err) {
	op->taken = true;
	if (op->canceled)
		return tn_fail(err, TAILNODE_CANCELED, 0, "tailnode: the operation was cancelled");
	if (e == ENOMEM)
		return tn_fail(err, TAILNODE_EXHAUSTED, e, "tailnode: out of memory");
	if (e)
		return tn_fail(err, op->isolated ? TAILNODE_CORE_LOST : TAILNODE_INTERNAL, e == ENODATA ? 0 : e,
		               op->isolated ? "tailnode: the process that ran the node has ended" : "tailnode: the core gave no answer");
	if (op->head.code) {
		tn_set(err, op->head.code, op->head.sys_errno, op->data + op->prefix, op->head.data_len);
		return op->head.code;
	}
	if (op->wants_fd && op->passed < 0) // the core sent one, but this process had no room for it
		return tn_fail(err, TAILNODE_EXHAUSTED, EMFILE, "tailnode: too many open files");
	if (out) {
		tailnode_result r = {.size = out->size, .fd = op->passed, .local = op->head.local, .remote = op->head.remote};
		op->passed = -1;
		if (op->head.data_len) {
			r.data = op->data;
			r.data_len = op->prefix + op->head.data_len;
			if (op->prefix)
				memcpy(r.data, &r.data_len, sizeof r.data_len); // the size field
			op->data = NULL;
		}
		memcpy(out, &r, out->size < sizeof r ? out->size : sizeof r);
	}
	return tn_ok(err);
}

// *fd: what to wait for where the result is pending.
static int try_take(struct op *op, tailnode_result *out, tailnode_error *err, int *fd) {
	struct callbacks *cb = NULL;
	pthread_mutex_lock(&op->mu);
	int code, e = 0;
	*fd = op->fd;
	if (op->taken) {
		code = tn_fail(err, op->canceled ? TAILNODE_CANCELED : TAILNODE_CLOSED, 0, "tailnode: the operation is over");
	} else if (!op->canceled && op->callbacks && !tn_callbacks_over(op->callbacks)) {
		code = tn_fail(err, TAILNODE_PENDING, 0, "tailnode: a callback of the node may still run");
	} else if (!op->canceled && (e = fill(op)) == EAGAIN) {
		code = tn_fail(err, TAILNODE_PENDING, 0, "tailnode: there is no result yet");
		*fd = op->reply; // the callbacks are over, or this is one of them
	} else {
		code = deliver(op, e, out, err);
		if (!op->canceled) { // else the last reference lets them run out
			cb = op->callbacks;
			op->callbacks = NULL;
		}
	}
	pthread_mutex_unlock(&op->mu);
	if (cb) // does not wait for any callback, but a thread's last steps
		tn_callbacks_join(cb);
	return code;
}

int tn_op_await(struct op *op, int64_t timeout_ms, tailnode_result *out, tailnode_error *err) {
	int64_t end = timeout_ms < 0 ? -1 : timeout_ms > INT64_MAX / 2 ? -1 : tn_now_ms() + timeout_ms;
	for (;;) {
		struct pollfd p = {.events = POLLIN};
		int code = try_take(op, out, err, &p.fd);
		if (code != TAILNODE_PENDING)
			return code;
		int64_t left = end < 0 ? -1 : end - tn_now_ms();
		if (end >= 0 && left <= 0)
			return code;
		if (poll(&p, 1, left > INT_MAX ? INT_MAX : (int)left) < 0 && errno != EINTR)
			return tn_fail(err, TAILNODE_INTERNAL, errno, "tailnode: poll: %s", strerror(errno));
		if (tn_forked)
			return tn_fail(err, TAILNODE_FORKED, 0, "tailnode: this process is a fork of the one that has the node");
	}
}

int tn_call(uint64_t node_id, const struct args *a, tailnode_result *out, tailnode_error *err) {
	struct op *op;
	int code = tn_start_op(node_id, a, true, &op, err);
	if (code)
		return code;
	code = tn_op_await(op, -1, out, err);
	tn_unref(op);
	return code;
}

int tn_op_publish(struct op *op, tailnode_op *out, tailnode_error *err) {
	uint64_t id = tn_handle_add(&op->o);
	tn_unref(op); // the table's reference remains
	if (!id)
		return tn_fail(err, TAILNODE_EXHAUSTED, ENOMEM, "tailnode: too many handles");
	out->id = id;
	return tn_ok(err);
}

static int bad_op(int code, tailnode_error *err) {
	return tn_fail(err, code, 0, code == TAILNODE_CLOSED ? "tailnode: the operation is over" : "tailnode: this is not the handle of an operation");
}

int tailnode_op_fd(tailnode_op h) {
	int code;
	if (tn_forked)
		return -1;
	struct op *op = tn_handle_get(h.id, O_OP, &code);
	if (!op)
		return -1;
	int fd = op->fd;
	tn_unref(op);
	return fd;
}

int tailnode_op_wait(tailnode_op h, int64_t timeout_ms, tailnode_result *out, tailnode_error *err) {
	CHECK_FORK(err);
	int code;
	if (out && (out->size < sizeof(size_t) || out->size > 4096))
		return tn_fail(err, TAILNODE_INVALID_ARGUMENT, 0, "tailnode: the size field of tailnode_result is not set");
	struct op *op = tn_handle_get(h.id, O_OP, &code);
	if (!op)
		return bad_op(code, err);
	code = tn_op_await(op, timeout_ms, out, err);
	if (code != TAILNODE_PENDING) {
		int ignored;
		tn_unref(tn_handle_remove(h.id, O_OP, &ignored));
	}
	tn_unref(op);
	return code;
}

int tailnode_op_take(tailnode_op h, tailnode_result *out, tailnode_error *err) { return tailnode_op_wait(h, 0, out, err); }

int tailnode_op_cancel(tailnode_op h) {
	CHECK_FORK(NULL);
	int code;
	struct op *op = tn_handle_remove(h.id, O_OP, &code);
	if (!op)
		return code;
	pthread_mutex_lock(&op->mu);
	op->canceled = true;
	pthread_mutex_unlock(&op->mu);
	shutdown(op->reply, SHUT_RDWR); // the core sees the end; a thread that waits wakes
	if (op->fd != op->reply)
		eventfd_write(op->fd, 1);
	tn_unref(op);
	return 0;
}
