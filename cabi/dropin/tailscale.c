// tailscale.c - libtailscale's functions on top of tailnode.h.
#define _GNU_SOURCE
#include "tailscale.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../include/tailnode.h"

#define API __attribute__((visibility("default")))

enum { LOG_UNSET = -2, LOG_NONE = -1 };

struct server {
	int id, refs; // refs under servers_mu
	struct server *next;
	pthread_mutex_t mu; // guards what follows; held while the node is made
	bool started, closed;
	tailnode_node node;
	char *text[4]; // dir, hostname, auth key, control URL
	bool ephemeral;
	int log_fd;
	char last[sizeof(((tailnode_error *)0)->message)];
};
enum { DIR_, HOSTNAME, AUTHKEY, CONTROL_URL };

static pthread_mutex_t servers_mu = PTHREAD_MUTEX_INITIALIZER;
static struct server *servers;
static int last_id;
static volatile int forked, used;

static void in_child(void) {
	if (used) // else there is no handle to be torn apart: a daemon may fork first
		forked = 1;
}
__attribute__((constructor)) static void at_load(void) { pthread_atfork(NULL, NULL, in_child); }

// What went wrong last in this thread.
static __thread struct {
	int id;
	char text[sizeof(((tailnode_error *)0)->message)];
} mine;

// ---- servers ----

static struct server *get(int id) { // with a reference, or NULL
	if (forked)
		return NULL;
	pthread_mutex_lock(&servers_mu);
	struct server *s = servers;
	while (s && s->id != id)
		s = s->next;
	if (s)
		s->refs++;
	pthread_mutex_unlock(&servers_mu);
	return s;
}

static void wipe(char *text) {
	if (text)
		explicit_bzero(text, strlen(text));
	free(text);
}

static void put(struct server *s) {
	pthread_mutex_lock(&servers_mu);
	bool last = --s->refs == 0;
	pthread_mutex_unlock(&servers_mu);
	if (!last)
		return;
	for (int i = 0; i < 4; i++)
		wipe(s->text[i]);
	if (s->log_fd >= 0)
		close(s->log_fd);
	pthread_mutex_destroy(&s->mu);
	free(s);
}

static int bad(void) { return forked ? -1 : EBADF; }

static int fail(struct server *s, const char *text) {
	mine.id = s->id;
	snprintf(mine.text, sizeof mine.text, "%s", text);
	pthread_mutex_lock(&s->mu);
	snprintf(s->last, sizeof s->last, "%s", text);
	pthread_mutex_unlock(&s->mu);
	return -1;
}

API tailscale tailscale_new(void) {
	if (forked)
		return -1;
	used = 1;
	struct server *s = calloc(1, sizeof *s);
	if (!s)
		return -1;
	pthread_mutex_init(&s->mu, NULL);
	s->refs = 1;
	s->log_fd = LOG_UNSET;
	pthread_mutex_lock(&servers_mu);
	int id = last_id == INT32_MAX ? -1 : ++last_id;
	if (id > 0) {
		s->id = id;
		s->next = servers;
		servers = s;
	}
	pthread_mutex_unlock(&servers_mu);
	if (id < 0)
		put(s);
	return id;
}

// ---- logs, on the library's thread for callbacks ----

// Never blocks, so that tailscale_close can wait for the thread: what finds no room is dropped, and a line is cut to what a pipe takes whole.
static void write_line(int fd, const char *text, size_t len) {
	char line[4096];
	if (len > sizeof line - 1)
		len = sizeof line - 1;
	memcpy(line, text, len);
	line[len++] = '\n';
	struct pollfd p = {.fd = fd, .events = POLLOUT};
	if (poll(&p, 1, 0) == 1 && !(p.revents & (POLLERR | POLLHUP | POLLNVAL)))
		(void)!write(fd, line, len);
}

static void on_log(void *user, int level, const char *text, size_t len) {
	(void)level;
	write_line((int)(intptr_t)user, text, len);
}

static void on_url(void *user, const char *url) {
	int fd = (int)(intptr_t)user;
	char text[2048];
	int n = snprintf(text, sizeof text, "To let this node into the tailnet, visit: %s", url);
	if (fd != LOG_NONE)
		write_line(fd == LOG_UNSET ? 2 : fd, text, (size_t)n < sizeof text ? (size_t)n : sizeof text - 1);
}

// ---- starting ----

#ifdef TAILNODE_STATIC
static void use_core(void) { tailnode_use_core(tailnode_core_serve); }
#else
static void use_core(void) {}
#endif

// Makes the node, once, from what was set until now.
static int started(struct server *s, tailnode_node *node) {
	tailnode_error err;
	int code = 0;
	pthread_mutex_lock(&s->mu);
	if (s->closed) {
		code = -1;
		snprintf(err.message, sizeof err.message, "the server is closed");
	} else if (!s->started) {
		static pthread_once_t once = PTHREAD_ONCE_INIT;
		pthread_once(&once, use_core);
		const char *mode = secure_getenv("TAILNODE_MODE");
		tailnode_options o = TAILNODE_OPTIONS_INIT;
		o.mode = mode && !strcmp(mode, "isolated") ? TAILNODE_ISOLATED : TAILNODE_IN_PROCESS;
		o.flags = s->ephemeral ? TAILNODE_EPHEMERAL : 0;
		o.dir = s->text[DIR_];
		o.hostname = s->text[HOSTNAME];
		o.auth_key = s->text[AUTHKEY];
		o.control_url = s->text[CONTROL_URL];
		o.log = s->log_fd >= 0 ? on_log : NULL;
		o.auth_url = on_url;
		o.user = (void *)(intptr_t)s->log_fd;
		code = tailnode_new(&o, &s->node, &err);
		s->started = !code;
		if (!code) {
			wipe(s->text[AUTHKEY]);
			s->text[AUTHKEY] = NULL;
		}
	}
	*node = s->node;
	pthread_mutex_unlock(&s->mu);
	return code ? fail(s, err.message) : 0;
}

// The start of every call that needs a node.
#define NODE(sd)                       \
	struct server *s = get(sd);    \
	tailnode_node node;            \
	tailnode_error err;            \
	if (!s)                        \
		return bad();          \
	int r = started(s, &node);     \
	if (r) {                       \
		put(s);                \
		return r;              \
	}

static int done(struct server *s, int code, const tailnode_error *err) {
	int r = code ? fail(s, err->message) : 0;
	put(s);
	return r;
}

API int tailscale_start(tailscale sd) {
	NODE(sd)
	return done(s, tailnode_start(node, &err), &err);
}

API int tailscale_up(tailscale sd) {
	NODE(sd)
	return done(s, tailnode_up(node, TAILNODE_FOREVER, &err), &err);
}

API int tailscale_close(tailscale sd) {
	if (forked)
		return -1;
	pthread_mutex_lock(&servers_mu);
	struct server **at = &servers;
	while (*at && (*at)->id != sd)
		at = &(*at)->next;
	struct server *s = *at;
	if (s)
		*at = s->next; // with the list's reference
	pthread_mutex_unlock(&servers_mu);
	if (!s)
		return EBADF;
	pthread_mutex_lock(&s->mu);
	s->closed = true;
	bool has_node = s->started;
	pthread_mutex_unlock(&s->mu);
	int code = has_node ? tailnode_close(s->node, NULL) : 0;
	if (code == TAILNODE_EXHAUSTED) { // nothing was closed
		pthread_mutex_lock(&s->mu);
		s->closed = false;
		pthread_mutex_unlock(&s->mu);
		pthread_mutex_lock(&servers_mu);
		s->next = servers;
		servers = s;
		pthread_mutex_unlock(&servers_mu);
		return -1;
	}
	put(s);
	return code ? -1 : 0;
}

// ---- settings ----

static int set_text(tailscale sd, int which, const char *value) {
	struct server *s = get(sd);
	if (!s)
		return bad();
	char *copy = value && *value ? strdup(value) : NULL, *old = copy;
	const char *why = value && *value && !copy ? "out of memory" : NULL;
	pthread_mutex_lock(&s->mu);
	if (s->started) {
		why = "the server has started: this is to be set before";
	} else if (!why) {
		old = s->text[which];
		s->text[which] = copy;
	}
	pthread_mutex_unlock(&s->mu);
	wipe(old);
	int r = why ? fail(s, why) : 0;
	put(s);
	return r;
}

API int tailscale_set_dir(tailscale sd, const char *dir) { return set_text(sd, DIR_, dir); }
API int tailscale_set_hostname(tailscale sd, const char *hostname) { return set_text(sd, HOSTNAME, hostname); }
API int tailscale_set_authkey(tailscale sd, const char *authkey) { return set_text(sd, AUTHKEY, authkey); }
API int tailscale_set_control_url(tailscale sd, const char *url) { return set_text(sd, CONTROL_URL, url); }

API int tailscale_set_ephemeral(tailscale sd, int ephemeral) {
	struct server *s = get(sd);
	if (!s)
		return bad();
	pthread_mutex_lock(&s->mu);
	bool late = s->started;
	if (!late)
		s->ephemeral = ephemeral != 0;
	pthread_mutex_unlock(&s->mu);
	int r = late ? fail(s, "the server has started: this is to be set before") : 0;
	put(s);
	return r;
}

API int tailscale_set_logfd(tailscale sd, int fd) {
	struct server *s = get(sd);
	if (!s)
		return bad();
	char why[128] = "";
	int copy = LOG_NONE;
	if (fd != -1 && (copy = fcntl(fd, F_DUPFD_CLOEXEC, 3)) < 0)
		snprintf(why, sizeof why, "the descriptor for logs: %s", strerror(errno));
	pthread_mutex_lock(&s->mu);
	if (s->started)
		snprintf(why, sizeof why, "the server has started: this is to be set before");
	int unused = copy;
	if (!*why) {
		unused = s->log_fd;
		s->log_fd = copy;
	}
	pthread_mutex_unlock(&s->mu);
	if (unused >= 0)
		close(unused);
	int r = *why ? fail(s, why) : 0;
	put(s);
	return r;
}

// ---- text for the host ----

// Writes text into buf; it is cut and ends with NUL in any case that leaves room for that.
static int give(const char *text, char *buf, size_t size) {
	if (!buf || !size)
		return ERANGE;
	size_t n = strlen(text), k = n < size ? n : size - 1;
	memcpy(buf, text, k);
	buf[k] = 0;
	return n < size ? 0 : ERANGE;
}

API int tailscale_getips(tailscale sd, char *buf, size_t size) {
	struct server *s = get(sd);
	if (!s)
		return bad();
	if (!buf && size) {
		int r = fail(s, "there is no buffer for the addresses");
		put(s);
		return r;
	}
	pthread_mutex_lock(&s->mu);
	bool has_node = s->started;
	tailnode_node node = s->node;
	pthread_mutex_unlock(&s->mu);
	char text[2 * TAILNODE_ADDR_TEXT + 1] = "";
	tailnode_addr a[2] = {{.family = 0}, {.family = 0}};
	tailnode_error err;
	int code = has_node ? tailnode_addresses(node, &a[0], &a[1], &err) : 0;
	if (code)
		return done(s, code, &err);
	for (int i = 0; i < 2; i++) {
		size_t n = strlen(text);
		if (!a[i].family)
			continue;
		if (n)
			text[n++] = ',';
		tailnode_addr_format(&a[i], text + n, TAILNODE_ADDR_TEXT);
	}
	put(s);
	return give(text, buf, size);
}

API int tailscale_errmsg(tailscale sd, char *buf, size_t size) {
	if (buf && size)
		*buf = 0;
	struct server *s = get(sd);
	if (!s)
		return bad();
	char text[sizeof s->last];
	if (mine.id == sd) {
		memcpy(text, mine.text, sizeof text);
	} else {
		pthread_mutex_lock(&s->mu);
		memcpy(text, s->last, sizeof text);
		pthread_mutex_unlock(&s->mu);
	}
	put(s);
	return give(text, buf, size);
}

// ---- connections ----

// The peer's address of every connection that was accepted, and the server of every listener, by descriptor. The host closes descriptors without
// telling, so that an entry counts only as long as the descriptor is still that socket.
static struct {
	pthread_mutex_t mu;
	struct known {
		dev_t dev;
		ino_t ino;
		tailnode_addr addr; // of a connection
		int sd;             // of a listener, else 0
		bool set;
	} * at;
	int len;
} table = {.mu = PTHREAD_MUTEX_INITIALIZER};

static bool remember(int fd, const tailnode_addr *addr, int sd) {
	struct stat st;
	if (fstat(fd, &st) < 0)
		return false;
	pthread_mutex_lock(&table.mu);
	if (fd >= table.len) {
		int len = fd < 32 ? 64 : fd * 2;
		struct known *p = realloc(table.at, (size_t)len * sizeof *p);
		if (!p) {
			pthread_mutex_unlock(&table.mu);
			return false;
		}
		memset(p + table.len, 0, (size_t)(len - table.len) * sizeof *p);
		table.at = p;
		table.len = len;
	}
	table.at[fd] = (struct known){.dev = st.st_dev, .ino = st.st_ino, .addr = *addr, .sd = sd, .set = true};
	pthread_mutex_unlock(&table.mu);
	return true;
}

static bool recall(int fd, struct known *out) {
	struct stat st;
	if (fd < 0 || fstat(fd, &st) < 0)
		return false;
	pthread_mutex_lock(&table.mu);
	struct known *found = NULL, *k = fd < table.len ? &table.at[fd] : NULL;
	if (k && k->set && k->ino == st.st_ino && k->dev == st.st_dev)
		found = k;
	for (int i = 0; !found && i < table.len; i++) { // a duplicate
		k = &table.at[i];
		if (k->set && k->ino == st.st_ino && k->dev == st.st_dev)
			found = k;
	}
	if (found)
		*out = *found;
	pthread_mutex_unlock(&table.mu);
	return found != NULL;
}

API int tailscale_dial(tailscale sd, const char *network, const char *addr, tailscale_conn *out) {
	NODE(sd)
	int fd;
	int code = tailnode_dial(node, network, addr, 0, TAILNODE_FOREVER, out ? &fd : NULL, NULL, NULL, &err);
	if (!code)
		*out = fd;
	return done(s, code, &err);
}

API int tailscale_listen(tailscale sd, const char *network, const char *addr, tailscale_listener *out) {
	NODE(sd)
	int fd;
	int code = tailnode_listen(node, network, addr, 0, out ? &fd : NULL, NULL, &err);
	if (!code) {
		remember(fd, &(tailnode_addr){.family = 0}, sd); // without it, errors of accept have no text
		*out = fd;
	}
	return done(s, code, &err);
}

API int tailscale_accept(tailscale_listener listener, tailscale_conn *out) {
	tailnode_error err;
	tailnode_addr remote;
	int fd;
	if (forked)
		return -1;
	if (listener < 0 || fcntl(listener, F_GETFD) < 0) {
		errno = EBADF;
		return EBADF;
	}
	int code = tailnode_accept(listener, 0, out ? &fd : NULL, &remote, NULL, &err);
	if (!code && !remember(fd, &remote, 0)) {
		close(fd);
		code = TAILNODE_EXHAUSTED;
		err.sys_errno = ENOMEM;
		snprintf(err.message, sizeof err.message, "out of memory");
	}
	if (!code) {
		*out = fd;
		return 0;
	}
	struct known k;
	struct server *s = recall(listener, &k) && k.sd ? get(k.sd) : NULL;
	if (s) {
		fail(s, err.message);
		put(s);
	}
	errno = err.sys_errno ? err.sys_errno : code == TAILNODE_CLOSED ? ECONNABORTED : EINVAL;
	return -1;
}

API int tailscale_getremoteaddr(tailscale_listener listener, tailscale_conn conn, char *buf, size_t size) {
	struct known k;
	if (forked)
		return -1;
	if (listener < 0 || !recall(conn, &k) || !k.addr.family)
		return EBADF;
	if (!buf && size)
		return -1;
	char text[TAILNODE_ADDR_TEXT];
	k.addr.port = 0;
	tailnode_addr_format(&k.addr, text, sizeof text);
	return give(text, buf, size);
}

API int tailscale_loopback(tailscale sd, char *addr_out, size_t addrlen, char *proxy_out, char *local_out) {
	NODE(sd)
	if (!proxy_out || !local_out || (!addr_out && addrlen)) {
		r = fail(s, "there is no room for the address or a credential");
		put(s);
		return r;
	}
	tailnode_loopback_info li = {.size = sizeof li};
	int code = tailnode_loopback(node, &li, &err);
	if (!code && (strlen(li.proxy_credential) != 32 || strlen(li.local_api_credential) != 32)) {
		code = TAILNODE_INTERNAL;
		snprintf(err.message, sizeof err.message, "a credential does not have 32 characters");
	}
	if (!code) {
		memcpy(proxy_out, li.proxy_credential, 33);
		memcpy(local_out, li.local_api_credential, 33);
		r = give(li.address, addr_out, addrlen);
	}
	explicit_bzero(&li, sizeof li);
	if (code)
		return done(s, code, &err);
	put(s);
	return r;
}

API int tailscale_enable_funnel_to_localhost_plaintext_http1(tailscale sd, int port) {
	(void)port;
	struct server *s = get(sd);
	if (!s)
		return bad();
	int r = fail(s, "Funnel is not offered");
	put(s);
	return r;
}

// ---- the names that bindings call ----

API int TsnetNewServer(void) { return tailscale_new(); }
API int TsnetStart(int sd) { return tailscale_start(sd); }
API int TsnetUp(int sd) { return tailscale_up(sd); }
API int TsnetClose(int sd) { return tailscale_close(sd); }
API int TsnetErrmsg(int sd, char *buf, size_t size) { return tailscale_errmsg(sd, buf, size); }
API int TsnetDial(int sd, char *network, char *addr, int *out) { return tailscale_dial(sd, network, addr, out); }
API int TsnetSetDir(int sd, char *str) { return tailscale_set_dir(sd, str); }
API int TsnetSetHostname(int sd, char *str) { return tailscale_set_hostname(sd, str); }
API int TsnetSetAuthKey(int sd, char *str) { return tailscale_set_authkey(sd, str); }
API int TsnetSetControlURL(int sd, char *str) { return tailscale_set_control_url(sd, str); }
API int TsnetSetEphemeral(int sd, int e) { return tailscale_set_ephemeral(sd, e); }
API int TsnetSetLogFD(int sd, int fd) { return tailscale_set_logfd(sd, fd); }
API int TsnetGetIps(int sd, char *buf, size_t size) { return tailscale_getips(sd, buf, size); }
API int TsnetGetRemoteAddr(int listener, int conn, char *buf, size_t size) { return tailscale_getremoteaddr(listener, conn, buf, size); }
API int TsnetListen(int sd, char *network, char *addr, int *out) { return tailscale_listen(sd, network, addr, out); }
API int TsnetAccept(int listener, int *out) { return tailscale_accept(listener, out); }
API int TsnetLoopback(int sd, char *addr, size_t size, char *proxy, char *local) { return tailscale_loopback(sd, addr, size, proxy, local); }
API int TsnetEnableFunnelToLocalhostPlaintextHttp1(int sd, int port) { return tailscale_enable_funnel_to_localhost_plaintext_http1(sd, port); }
