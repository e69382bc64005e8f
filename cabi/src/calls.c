// calls.c - the functions of the header that speak to the core.
#include "internal.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/eventfd.h>

#define NEED(cond, what)                                                                                          \
	do {                                                                                                      \
		if (!(cond))                                                                                      \
			return tn_fail(err, TAILNODE_INVALID_ARGUMENT, 0, "tailnode: " what);                     \
	} while (0)

// ---- nodes ----

static void node_destroy(void *p) {
	struct node *n = p;
	if (n->core)
		tn_core_unref(n->core);
	if (n->open_msg) {
		explicit_bzero(n->open_msg, n->open_len);
		free(n->open_msg);
	}
	if (n->callbacks)
		tn_callbacks_release(n->callbacks);
	if (n->log_fd >= 0)
		close(n->log_fd);
	free(n->helper_path);
	pthread_mutex_destroy(&n->attaching);
	pthread_mutex_destroy(&n->mu);
	free(n);
}

// The name of the host's program; "" where it cannot be known. The core would give the helper's.
static const char *program_name(char buf[PATH_MAX]) {
	static const char gone[] = " (deleted)"; // as the system says of a program that was replaced
	ssize_t n = readlink("/proc/self/exe", buf, PATH_MAX - 1);
	if (n <= 0)
		return program_invocation_short_name ? program_invocation_short_name : "";
	buf[n] = 0;
	size_t tail = sizeof gone - 1;
	if ((size_t)n > tail && !strcmp(buf + n - tail, gone))
		buf[(size_t)n - tail] = 0;
	char *slash = strrchr(buf, '/');
	return slash ? slash + 1 : buf;
}

// The directory of the user's configuration; "" where there is none.
static const char *config_dir(char buf[PATH_MAX]) {
	const char *xdg = secure_getenv("XDG_CONFIG_HOME"), *home = secure_getenv("HOME");
	int n = xdg && *xdg ? snprintf(buf, PATH_MAX, "%s", xdg) : home && *home ? snprintf(buf, PATH_MAX, "%s/.config", home) : 0;
	return n > 0 && n < PATH_MAX && *buf == '/' ? buf : "";
}

// path from the working directory of now: a core may start later, and again, when the host has gone elsewhere. It is to be freed.
static int absolute(char **out, const char *path, tailnode_error *err) {
	char cwd[PATH_MAX];
	*out = NULL;
	if (*path != '/' && !getcwd(cwd, sizeof cwd))
		return tn_fail(err, TAILNODE_INVALID_ARGUMENT, errno, "tailnode: the relative path %s leads nowhere: %s", path, strerror(errno));
	if (*path == '/' ? !(*out = strdup(path)) : asprintf(out, "%s/%s", cwd, path) < 0) {
		*out = NULL;
		return tn_fail(err, TAILNODE_EXHAUSTED, ENOMEM, "tailnode: out of memory");
	}
	return 0;
}

// A node without a core yet.
static int make(const tailnode_options *given, struct node **out, tailnode_error *err) {
	CHECK_FORK(err);
	NEED(given, "tailnode_new needs options");
	NEED(given->size >= offsetof(tailnode_options, helper_path) && given->size <= 4096, "the size field of tailnode_options is not set");
	tailnode_options o;
	memset(&o, 0, sizeof o);
	memcpy(&o, given, given->size < sizeof o ? given->size : sizeof o);
	NEED(o.mode <= TAILNODE_ISOLATED, "this mode does not exist");
	NEED(!(o.flags & ~(TAILNODE_EPHEMERAL | TAILNODE_STATE_MEMORY | TAILNODE_RESTART)), "this flag does not exist");
	NEED(o.port <= 65535, "the port is above 65535");
	NEED(o.memory_limit >= 0 && o.max_procs >= 0 && o.gc_percent >= -1, "a limit of the runtime is negative");
	NEED(o.log_fd >= 0, "log_fd is negative");

	tn_used = 1;
	struct node *n = calloc(1, sizeof *n);
	if (!n)
		return tn_fail(err, TAILNODE_EXHAUSTED, ENOMEM, "tailnode: out of memory");
	static uint64_t numbers;
	pthread_mutex_init(&n->mu, NULL);
	pthread_mutex_init(&n->attaching, NULL);
	n->last = &n->first;
	n->o = (struct object_header){.type = O_NODE, .refs = 1, .destroy = node_destroy};
	n->number = __atomic_add_fetch(&numbers, 1, __ATOMIC_RELAXED);
	n->mode = o.mode;
	n->flags = o.flags;
	n->log = o.log;
	n->auth_url = o.auth_url;
	n->user = o.user;
	n->log_fd = -1;
	int code = 0;
	char *dir = NULL, helper[PATH_MAX];
	if (o.mode == TAILNODE_ISOLATED)
		code = absolute(&n->helper_path, tn_helper_path(helper, o.helper_path), err);
	if (!code && o.dir && *o.dir && !(o.flags & TAILNODE_STATE_MEMORY)) {
		code = absolute(&dir, o.dir, err);
		o.dir = dir;
	}
	if (!code && o.log_fd > 0 && !o.log && (n->log_fd = fcntl(o.log_fd, F_DUPFD_CLOEXEC, 3)) < 0)
		code = tn_fail(err, errno == EBADF ? TAILNODE_INVALID_ARGUMENT : TAILNODE_EXHAUSTED, errno, "tailnode: log_fd: %s", strerror(errno));
	bool framed = o.log || o.auth_url;
	// Read here, for a Go runtime sees the environment as it was when the process started.
	if (!o.auth_key || !*o.auth_key)
		o.auth_key = secure_getenv("TS_AUTHKEY");
	if (!o.auth_key || !*o.auth_key)
		o.auth_key = secure_getenv("TS_AUTH_KEY");
	if (!o.control_url || !*o.control_url)
		o.control_url = secure_getenv("TS_CONTROL_URL");
	char exe[PATH_MAX], config[PATH_MAX];
	struct args a = {
	    .kind = K_NEW,
	    .arg = {o.flags, o.port, o.log_level, (o.log ? 1 : 0) | (n->log_fd >= 0 ? 2 : 0) | (framed ? 4 : 0), o.memory_limit, o.gc_percent, o.max_procs},
	    .str = {o.dir, o.hostname, o.auth_key, o.control_url, o.tags, o.root_ca_pem, program_name(exe), config_dir(config)},
	    .strings = 8,
	};
	if (!code)
		code = tn_pack(&n->open_msg, &n->open_len, n->number, &a, err);
	free(dir);
	if (code)
		tn_unref(n);
	else
		*out = n;
	return code;
}

int tailnode_new(const tailnode_options *given, tailnode_node *out, tailnode_error *err) {
	struct node *n;
	NEED(out, "there is no place for the node's handle");
	int code = make(given, &n, err);
	if (code)
		return code;
	struct op *op;
	code = tn_start_op_on(n, &(struct args){.kind = K_STATS}, true, &op, err); // now, so that a missing core is told here
	if (!code) {
		code = tn_op_await(op, -1, NULL, err);
		tn_unref(op);
	}
	uint64_t id = code ? 0 : tn_handle_add(&n->o);
	if (!code && !id)
		code = tn_fail(err, TAILNODE_EXHAUSTED, ENOMEM, "tailnode: too many handles");
	if (!code) {
		out->id = id;
		tn_unref(n);
		return tn_ok(err);
	}
	if (tn_start_op_on(n, &(struct args){.kind = K_CLOSE}, true, &op, NULL) == 0) {
		tn_op_await(op, -1, NULL, NULL);
		tn_unref(op);
	}
	struct callbacks *cb = n->callbacks;
	n->callbacks = NULL;
	if (cb)
		tn_callbacks_join(cb);
	tn_unref(n);
	return code;
}

int tailnode_new_start(const tailnode_options *given, tailnode_node *node, tailnode_op *out, tailnode_error *err) {
	struct node *n;
	struct op *op;
	NEED(node && out, "there is no place for a handle");
	int code = make(given, &n, err);
	if (code)
		return code;
	tailnode_node h = {tn_handle_add(&n->o)};
	if (!h.id) {
		tn_unref(n);
		return tn_fail(err, TAILNODE_EXHAUSTED, ENOMEM, "tailnode: too many handles");
	}
	code = tn_start_op_on(n, &(struct args){.kind = K_ADDRESSES}, false, &op, err);
	tn_unref(n);
	tailnode_op published;
	if (!code)
		code = tn_op_publish(op, &published, err);
	if (code) {
		tailnode_close(h, NULL);
		return code;
	}
	*node = h;
	*out = published;
	return 0;
}

// ready: for an operation that ends with the callbacks, what is to tell that; -1 where there are none.
static int close_op(tailnode_node node, bool wait, struct op **op, struct callbacks **cb, int *ready, tailnode_error *err) {
	CHECK_FORK(err);
	int code = 0;
	struct node *n = tn_handle_get(node.id, O_NODE, &code);
	if (!n)
		return tn_fail(err, code, 0, code == TAILNODE_CLOSED ? "tailnode: the node is closed" : "tailnode: this is not the handle of a node");
	if (ready && (n->log || n->auth_url) && (*ready = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) < 0) {
		code = tn_fail(err, TAILNODE_EXHAUSTED, errno, "tailnode: eventfd: %s", strerror(errno));
		tn_unref(n);
		return code;
	}
	pthread_mutex_lock(&n->mu);
	bool first = !n->closing;
	n->closing = true;
	uint32_t flags = n->flags;
	if (first)
		n->flags &= ~TAILNODE_RESTART; // a helper that is dead is as good as closed
	pthread_mutex_unlock(&n->mu);
	if (!first) {
		tn_unref(n);
		return tn_fail(err, TAILNODE_CLOSED, 0, "tailnode: the node is closed");
	}
	code = tn_start_op_on(n, &(struct args){.kind = K_CLOSE}, wait, op, err);
	if (code == TAILNODE_EXHAUSTED) { // nothing was closed: the handle stays, for another try
		pthread_mutex_lock(&n->mu);
		n->closing = false;
		n->flags = flags;
		pthread_mutex_unlock(&n->mu);
		tn_unref(n);
		return code;
	}
	pthread_mutex_lock(&n->mu);
	*cb = n->callbacks;
	n->callbacks = NULL;
	pthread_mutex_unlock(&n->mu);
	int ignored;
	tn_unref(tn_handle_remove(node.id, O_NODE, &ignored));
	tn_unref(n); // once the last call in flight is over, the socket to a helper closes, and the helper ends
	return code;
}

int tailnode_close(tailnode_node node, tailnode_error *err) {
	struct op *op;
	struct callbacks *cb = NULL;
	int code = close_op(node, true, &op, &cb, NULL, err);
	if (!code) {
		code = tn_op_await(op, -1, NULL, err);
		tn_unref(op);
	}
	if (cb)
		tn_callbacks_join(cb);
	return code;
}

// ---- calls that only wait for the core ----

static int start_public(tailnode_node node, const struct args *a, tailnode_op *out, tailnode_error *err) {
	NEED(out, "there is no place for the operation's handle");
	struct op *op;
	int code = tn_start_op(node.id, a, false, &op, err);
	return code ? code : tn_op_publish(op, out, err);
}

int tailnode_close_start(tailnode_node node, tailnode_op *out, tailnode_error *err) {
	NEED(out, "there is no place for the operation's handle");
	struct op *op;
	struct callbacks *cb = NULL;
	int ready = -1;
	int code = close_op(node, false, &op, &cb, &ready, err);
	if (code) {
		if (ready >= 0)
			close(ready);
		if (cb)
			tn_callbacks_release(cb);
		return code;
	}
	op->callbacks = cb; // nobody else has op yet
	if (cb) {
		op->fd = ready;
		if (tn_callbacks_closing(cb, op))
			ready = -1;
		else
			op->fd = op->reply;
	}
	if (ready >= 0)
		close(ready);
	return tn_op_publish(op, out, err);
}

int tailnode_start(tailnode_node node, tailnode_error *err) {
	return tn_call(node.id, &(struct args){.kind = K_START}, NULL, err);
}
int tailnode_start_start(tailnode_node node, tailnode_op *op, tailnode_error *err) { return start_public(node, &(struct args){.kind = K_START}, op, err); }

#define UP_ARGS (struct args){.kind = K_UP, .timeout_ms = timeout_ms}
int tailnode_up(tailnode_node node, int64_t timeout_ms, tailnode_error *err) { return tn_call(node.id, &UP_ARGS, NULL, err); }
int tailnode_up_start(tailnode_node node, int64_t timeout_ms, tailnode_op *op, tailnode_error *err) { return start_public(node, &UP_ARGS, op, err); }

static int call_json(tailnode_node node, const struct args *a, char **json, size_t *len, tailnode_error *err) {
	NEED(json, "there is no place for the answer");
	tailnode_result r = {.size = sizeof r, .fd = -1};
	int code = tn_call(node.id, a, &r, err);
	if (code)
		return code;
	*json = r.data;
	if (len)
		*len = r.data_len;
	return 0;
}

#define STATUS_ARGS (struct args){.kind = K_STATUS, .arg = {peers != 0}}
int tailnode_status(tailnode_node node, int peers, char **json, size_t *len, tailnode_error *err) { return call_json(node, &STATUS_ARGS, json, len, err); }
int tailnode_status_start(tailnode_node node, int peers, tailnode_op *op, tailnode_error *err) { return start_public(node, &STATUS_ARGS, op, err); }

#define WHOIS_ARGS (struct args){.kind = K_WHOIS, .timeout_ms = timeout_ms, .str = {addr}, .strings = 1}
int tailnode_whois(tailnode_node node, const char *addr, int64_t timeout_ms, char **json, size_t *len, tailnode_error *err) {
	NEED(addr, "the address is NULL");
	return call_json(node, &WHOIS_ARGS, json, len, err);
}
int tailnode_whois_start(tailnode_node node, const char *addr, int64_t timeout_ms, tailnode_op *op, tailnode_error *err) {
	NEED(addr, "the address is NULL");
	return start_public(node, &WHOIS_ARGS, op, err);
}

#define PING_ARGS (struct args){.kind = K_PING, .timeout_ms = timeout_ms, .str = {ip, type}, .strings = 2}
int tailnode_ping(tailnode_node node, const char *ip, const char *type, int64_t timeout_ms, char **json, size_t *len, tailnode_error *err) {
	NEED(ip && type, "the address or the type is NULL");
	return call_json(node, &PING_ARGS, json, len, err);
}
int tailnode_ping_start(tailnode_node node, const char *ip, const char *type, int64_t timeout_ms, tailnode_op *op, tailnode_error *err) {
	NEED(ip && type, "the address or the type is NULL");
	return start_public(node, &PING_ARGS, op, err);
}

#define ADDRESSES_ARGS (struct args){.kind = K_ADDRESSES}
int tailnode_addresses(tailnode_node node, tailnode_addr *ip4, tailnode_addr *ip6, tailnode_error *err) {
	tailnode_result r = {.size = sizeof r, .fd = -1};
	int code = tn_call(node.id, &ADDRESSES_ARGS, &r, err);
	if (code)
		return code;
	if (ip4)
		*ip4 = r.local;
	if (ip6)
		*ip6 = r.remote;
	return 0;
}
int tailnode_addresses_start(tailnode_node node, tailnode_op *op, tailnode_error *err) { return start_public(node, &ADDRESSES_ARGS, op, err); }

// ---- calls that give a descriptor ----

static int call_fd(tailnode_node node, const struct args *a, int *fd, tailnode_addr *local, tailnode_addr *remote, tailnode_error *err) {
	NEED(fd, "there is no place for the descriptor");
	NEED(!(a->arg[0] & ~(int64_t)TAILNODE_NONBLOCK), "this flag does not exist");
	tailnode_result r = {.size = sizeof r, .fd = -1};
	int code = tn_call(node.id, a, &r, err);
	if (code)
		return code;
	if (r.fd < 0) // the core sent one, but this process had no room for it
		return tn_fail(err, TAILNODE_EXHAUSTED, EMFILE, "tailnode: too many open files");
	*fd = r.fd;
	if (local)
		*local = r.local;
	if (remote)
		*remote = r.remote;
	return 0;
}

static int start_fd(tailnode_node node, const struct args *a, tailnode_op *op, tailnode_error *err) {
	NEED(!(a->arg[0] & ~(int64_t)TAILNODE_NONBLOCK), "this flag does not exist");
	return start_public(node, a, op, err);
}

#define NEED_ADDRESS NEED(network && address, "the network or the address is NULL")

#define DIAL_ARGS (struct args){.kind = K_DIAL, .timeout_ms = timeout_ms, .arg = {flags}, .str = {network, address}, .strings = 2}
int tailnode_dial(tailnode_node node, const char *network, const char *address, uint32_t flags, int64_t timeout_ms, int *fd, tailnode_addr *local,
                  tailnode_addr *remote, tailnode_error *err) {
	NEED_ADDRESS;
	return call_fd(node, &DIAL_ARGS, fd, local, remote, err);
}
int tailnode_dial_start(tailnode_node node, const char *network, const char *address, uint32_t flags, int64_t timeout_ms, tailnode_op *op, tailnode_error *err) {
	NEED_ADDRESS;
	return start_fd(node, &DIAL_ARGS, op, err);
}

#define LISTEN_ARGS(k) (struct args){.kind = k, .arg = {flags}, .str = {network, address}, .strings = 2}
int tailnode_listen(tailnode_node node, const char *network, const char *address, uint32_t flags, int *fd, tailnode_addr *bound, tailnode_error *err) {
	NEED_ADDRESS;
	return call_fd(node, &LISTEN_ARGS(K_LISTEN), fd, bound, NULL, err);
}
int tailnode_listen_start(tailnode_node node, const char *network, const char *address, uint32_t flags, tailnode_op *op, tailnode_error *err) {
	NEED_ADDRESS;
	return start_fd(node, &LISTEN_ARGS(K_LISTEN), op, err);
}
int tailnode_listen_packet(tailnode_node node, const char *network, const char *address, uint32_t flags, int *fd, tailnode_addr *bound, tailnode_error *err) {
	NEED_ADDRESS;
	return call_fd(node, &LISTEN_ARGS(K_LISTEN_PACKET), fd, bound, NULL, err);
}
int tailnode_listen_packet_start(tailnode_node node, const char *network, const char *address, uint32_t flags, tailnode_op *op, tailnode_error *err) {
	NEED_ADDRESS;
	return start_fd(node, &LISTEN_ARGS(K_LISTEN_PACKET), op, err);
}

#define WATCH_ARGS (struct args){.kind = K_WATCH, .arg = {flags}}
int tailnode_watch(tailnode_node node, uint32_t flags, int *fd, tailnode_error *err) { return call_fd(node, &WATCH_ARGS, fd, NULL, NULL, err); }
int tailnode_watch_start(tailnode_node node, uint32_t flags, tailnode_op *op, tailnode_error *err) { return start_fd(node, &WATCH_ARGS, op, err); }

// ---- calls that fill a struct ----

// The data of such an operation is the whole struct, its size field first.
static int call_struct(tailnode_node node, const struct args *a, void *out, size_t full, tailnode_error *err) {
	size_t size = 0;
	if (out)
		memcpy(&size, out, sizeof size);
	NEED(size >= sizeof size && size <= 4096, "the size field of the struct is not set");
	tailnode_result r = {.size = sizeof r, .fd = -1};
	int code = tn_call(node.id, a, &r, err);
	if (code)
		return code;
	size_t known = size < full ? size : full, n = r.data_len < known ? r.data_len : known;
	memset((char *)out + sizeof size, 0, known - sizeof size);
	if (n > sizeof size)
		memcpy((char *)out + sizeof size, r.data + sizeof size, n - sizeof size);
	free(r.data);
	return 0;
}

#define LOOPBACK_ARGS (struct args){.kind = K_LOOPBACK}
int tailnode_loopback(tailnode_node node, tailnode_loopback_info *out, tailnode_error *err) { return call_struct(node, &LOOPBACK_ARGS, out, sizeof *out, err); }
int tailnode_loopback_start(tailnode_node node, tailnode_op *op, tailnode_error *err) { return start_public(node, &LOOPBACK_ARGS, op, err); }

#define STATS_ARGS (struct args){.kind = K_STATS}
int tailnode_runtime_stats(tailnode_node node, tailnode_stats *out, tailnode_error *err) { return call_struct(node, &STATS_ARGS, out, sizeof *out, err); }
int tailnode_runtime_stats_start(tailnode_node node, tailnode_op *op, tailnode_error *err) { return start_public(node, &STATS_ARGS, op, err); }

// ---- calls that set the core's runtime ----

// Each as the call that waits and the one that does not.
#define SETTER(name, type, v, kind_, cond, what)                                                            \
	int tailnode_##name(tailnode_node node, type v, tailnode_error *err) {                              \
		NEED(cond, what);                                                                           \
		return tn_call(node.id, &(struct args){.kind = kind_, .arg = {v}}, NULL, err);              \
	}                                                                                                   \
	int tailnode_##name##_start(tailnode_node node, type v, tailnode_op *op, tailnode_error *err) {     \
		NEED(cond, what);                                                                           \
		return start_public(node, &(struct args){.kind = kind_, .arg = {v}}, op, err);              \
	}
SETTER(set_memory_limit, int64_t, bytes, K_MEMORY_LIMIT, bytes > 0, "the memory limit is not positive")
SETTER(set_max_procs, int32_t, n, K_MAX_PROCS, n > 0, "the number of processors is not positive")
SETTER(set_gc_percent, int32_t, percent, K_GC_PERCENT, percent >= -1, "the percentage is below -1")
SETTER(memory_pressure, int, level, K_PRESSURE, level >= 0 && level <= 2, "the level of memory pressure is not 0, 1 or 2")

int tailnode_trim(tailnode_node node, tailnode_error *err) { return tn_call(node.id, &(struct args){.kind = K_TRIM}, NULL, err); }
int tailnode_trim_start(tailnode_node node, tailnode_op *op, tailnode_error *err) { return start_public(node, &(struct args){.kind = K_TRIM}, op, err); }
