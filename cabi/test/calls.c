// calls.c - errors, operations, watching, callbacks, the runtime's figures.
#include <stdint.h>

#include "check.h"

static pthread_mutex_t mu = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t cond = PTHREAD_COND_INITIALIZER;
static int logged, urls;

static void on_log(void *user, int level, const char *text, size_t len) {
	CHECK(user == &logged && level >= TAILNODE_LOG_DEBUG && strlen(text) == len);
	CHECK(!strstr(text, "tskey") && !strstr(text, "privkey"));
	pthread_mutex_lock(&mu);
	logged++;
	pthread_cond_broadcast(&cond);
	pthread_mutex_unlock(&mu);
}

static void on_url(void *user, const char *url) {
	CHECK(user == &logged && !strncmp(url, "http", 4));
	pthread_mutex_lock(&mu);
	urls++;
	pthread_cond_broadcast(&cond);
	pthread_mutex_unlock(&mu);
}

static void *blocked_up(void *p) {
	tailnode_error e;
	tailnode_node n = *(tailnode_node *)p;
	return (void *)(intptr_t)tailnode_up(n, TAILNODE_FOREVER, &e);
}

static void *blocked_wait(void *p) {
	tailnode_op op = *(tailnode_op *)p;
	return (void *)(intptr_t)tailnode_op_wait(op, TAILNODE_FOREVER, NULL, NULL);
}

static void handles(tailnode_node n) {
	tailnode_node none = {0}, made_up = {0x1234567890abcdefu}, same_place = {n.id + (1u << 20)};
	tailnode_op as_op = {n.id};
	char *json;
	WANT(tailnode_start(none, &err), TAILNODE_INVALID_ARGUMENT);
	WANT(tailnode_up(made_up, 0, &err), TAILNODE_INVALID_ARGUMENT);
	CHECK(tailnode_status(same_place, 0, &json, NULL, &err) != 0);
	WANT(tailnode_op_take(as_op, NULL, &err), TAILNODE_INVALID_ARGUMENT);
	CHECK(tailnode_op_fd(as_op) == -1);
	WANT(tailnode_op_cancel(as_op), TAILNODE_INVALID_ARGUMENT);
	WANT(tailnode_new(NULL, NULL, &err), TAILNODE_INVALID_ARGUMENT);
	tailnode_options o = options("x");
	o.size = 0;
	WANT(tailnode_new(&o, &none, &err), TAILNODE_INVALID_ARGUMENT);
	o.size = sizeof o;
	o.mode = 7;
	WANT(tailnode_new(&o, &none, &err), TAILNODE_INVALID_ARGUMENT);
	WANT(tailnode_status(n, 1, NULL, NULL, &err), TAILNODE_INVALID_ARGUMENT);
	WANT(tailnode_dial(n, "tcp", NULL, 0, 0, NULL, NULL, NULL, NULL), TAILNODE_INVALID_ARGUMENT);
	int fd = -1;
	WANT(tailnode_dial(n, "tcp", "gopeer:7", 64, 0, &fd, NULL, NULL, &err), TAILNODE_INVALID_ARGUMENT);
	WANT(tailnode_dial(n, "tcp", "example.com:80", 0, 1000, &fd, NULL, NULL, &err), TAILNODE_NOT_TAILNET);
	WANT(tailnode_dial(n, "tcp", "nobody:80", 0, 1000, &fd, NULL, NULL, &err), TAILNODE_NO_SUCH_HOST);
	WANT(tailnode_dial(n, "tcp", "gopeer:1", 0, 30000, &fd, NULL, NULL, &err), TAILNODE_REFUSED);
	WANT(tailnode_dial(n, "ip", "gopeer:1", 0, 30000, &fd, NULL, NULL, &err), TAILNODE_UNSUPPORTED);
	WANT(tailnode_whois(n, "192.0.2.1", 1000, &json, NULL, &err), TAILNODE_NOT_FOUND);
	WANT(tailnode_ping(n, "not an address", "disco", 1000, &json, NULL, &err), TAILNODE_INVALID_ARGUMENT);
	CHECK(fd == -1);
	WANT(tailnode_accept(-1, 0, &fd, NULL, NULL, &err), TAILNODE_INVALID_ARGUMENT);
	WANT(tailnode_accept(0, 0, &fd, NULL, NULL, &err), TAILNODE_INVALID_ARGUMENT);
	WANT(tailnode_accept(0, 0, NULL, NULL, NULL, NULL), TAILNODE_INVALID_ARGUMENT);
	char *big = malloc(1 << 20);
	memset(big, 'a', (1 << 20) - 1);
	big[(1 << 20) - 1] = 0;
	WANT(tailnode_dial(n, "tcp", big, 0, 1000, &fd, NULL, NULL, &err), TAILNODE_INVALID_ARGUMENT);
	free(big);
	CHECK(!strcmp(tailnode_code_name(17), "no such host") && !strcmp(tailnode_code_name(-5), "unknown") && !strcmp(tailnode_code_name(9999), "unknown"));
	CHECK(tailnode_version_number() == TAILNODE_VERSION_NUMBER);
	tailnode_addr ad;
	char text[TAILNODE_ADDR_TEXT];
	const char *good[] = {"192.0.2.1:80", "[2001:db8::1]:443", "2001:db8::1", "192.0.2.1"};
	for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
		CHECK(tailnode_addr_parse(good[i], &ad) == 0 && tailnode_addr_format(&ad, text, sizeof text) == 0);
		CHECK(!strcmp(text, good[i]));
	}
	const char *bad[] = {"", ":", "1.2.3", "1.2.3.4:", "1.2.3.4:65536", "[::1", "[::1]x", "host:80", "1.2.3.4:8a"};
	for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
		CHECK(tailnode_addr_parse(bad[i], &ad) == TAILNODE_INVALID_ARGUMENT);
}

static void operations(tailnode_node n) {
	tailnode_op op;
	tailnode_result r = {.size = sizeof r};
	OK(tailnode_dial_start(n, "tcp", "gopeer:20", 0, 30000, &op, &err));
	wait_in(tailnode_op_fd(op), 30000);
	OK(tailnode_op_take(op, &r, &err));
	CHECK(r.fd >= 0 && r.remote.port == 20);
	char text[64] = {0}, want[TAILNODE_ADDR_TEXT];
	ssize_t k = 0, got = 0;
	while ((k = read(r.fd, text + got, sizeof text - 1 - (size_t)got)) > 0)
		got += k;
	OK(tailnode_addr_format(&r.local, want, sizeof want));
	CHECK(!strcmp(text, want));
	close(r.fd);
	WANT(tailnode_op_take(op, &r, &err), TAILNODE_CLOSED);
	WANT(tailnode_op_cancel(op), TAILNODE_CLOSED);
	CHECK(tailnode_op_fd(op) == -1);

	OK(tailnode_status_start(n, 1, &op, &err));
	wait_in(tailnode_op_fd(op), 30000);
	OK(tailnode_op_wait(op, 30000, &r, &err));
	CHECK(r.fd == -1 && r.data && strlen(r.data) == r.data_len);
	tailnode_free(r.data);

	// What is cancelled ends at once, for a thread that waits as well; what is never taken leaks nothing.
	OK(tailnode_dial_start(n, "tcp", "100.127.3.4:80", 0, TAILNODE_FOREVER, &op, &err));
	WANT(tailnode_op_take(op, NULL, &err), TAILNODE_PENDING);
	pthread_t t;
	CHECK(pthread_create(&t, NULL, blocked_wait, &op) == 0);
	OK(tailnode_op_cancel(op));
	void *res;
	pthread_join(t, &res);
	// The thread may have come too late to find the operation at all.
	CHECK((intptr_t)res == TAILNODE_CANCELED || (intptr_t)res == TAILNODE_CLOSED);
	for (int i = 0; i < 50; i++) {
		OK(tailnode_dial_start(n, "tcp", "gopeer:7", 0, 30000, &op, &err));
		if (i % 2)
			wait_in(tailnode_op_fd(op), 30000);
		OK(tailnode_op_cancel(op));
	}
	tailnode_stats st = {.size = sizeof st};
	for (;; poll(NULL, 0, 1)) { // the last connections end a moment after; an alarm if not
		OK(tailnode_runtime_stats(n, &st, &err));
		if (st.connections == 0 && st.calls_in_flight == 1)
			break;
	}
}

int main(void) {
	alarm(120);
	tailnode_options o = options("ccalls");
	o.log = on_log;
	o.auth_url = on_url;
	o.user = &logged;
	o.log_level = TAILNODE_LOG_DEBUG;
	tailnode_node n;
	OK(tailnode_new(&o, &n, &err));

	// A watch sees the node come up.
	int w;
	OK(tailnode_watch(n, 0, &w, &err));
	tailnode_event ev;
	do {
		OK(tailnode_read_event(w, &ev, &err));
	} while (ev.state != TAILNODE_STATE_RUNNING);
	OK(tailnode_up(n, 30000, &err));
	tailnode_addr v4, v6;
	OK(tailnode_addresses(n, &v4, &v6, &err));
	CHECK(v4.family == 4 && v6.family == 6);

	handles(n);
	operations(n);

	char *json;
	int fd;
	OK(tailnode_dial(n, "tcp", "gopeer:7", 0, 30000, &fd, NULL, &v4, &err));
	close(fd);
	v4.port = 0;
	char ip[TAILNODE_ADDR_TEXT];
	OK(tailnode_addr_format(&v4, ip, sizeof ip));
	OK(tailnode_ping(n, ip, "TSMP", 30000, &json, NULL, &err));
	CHECK(strstr(json, "LatencySeconds"));
	tailnode_free(json);

	tailnode_stats st = {.size = sizeof st};
	OK(tailnode_runtime_stats(n, &st, &err));
	CHECK(st.heap_live > 0 && st.total >= st.heap_live && st.nodes == 1 && st.threads > 0 && st.goroutines > 0);
	CHECK(st.crossings == (isolated() ? 0 : 1) && (st.pid == getpid()) == !isolated());
	tailnode_stats small = {.size = sizeof(size_t) + 8};
	OK(tailnode_runtime_stats(n, &small, &err));
	CHECK(small.heap_live && !small.heap_idle);
	OK(tailnode_set_memory_limit(n, 512 << 20, &err));
	OK(tailnode_set_gc_percent(n, 50, &err));
	OK(tailnode_set_max_procs(n, 1, &err));
	OK(tailnode_memory_pressure(n, 2, &err));
	OK(tailnode_runtime_stats(n, &st, &err));
	CHECK(st.memory_limit < 512 << 20 && st.max_procs == 1);
	OK(tailnode_memory_pressure(n, 0, &err));
	OK(tailnode_trim(n, &err));
	OK(tailnode_runtime_stats(n, &st, &err));
	CHECK(st.memory_limit == 512 << 20);

	pthread_mutex_lock(&mu);
	CHECK(logged > 0 && urls == 0);
	pthread_mutex_unlock(&mu);

	// Close ends what waits: up of a node that nobody lets in, and the watch.
	tailnode_options o2 = options("cwaits");
	o2.auth_key = "tskey-auth-wrong";
	tailnode_node refused;
	OK(tailnode_new(&o2, &refused, &err));
	WANT(tailnode_up(refused, 30000, &err), TAILNODE_AUTH_REFUSED);
	CHECK(err.message[0]);
	OK(tailnode_close(refused, &err));

	o2.control_url = "http://127.0.0.1:1";
	tailnode_node waits;
	OK(tailnode_new(&o2, &waits, &err));
	WANT(tailnode_up(waits, 1, &err), TAILNODE_TIMEOUT);
	pthread_t t;
	CHECK(pthread_create(&t, NULL, blocked_up, &waits) == 0);
	tailnode_op op;
	OK(tailnode_close_start(waits, &op, &err));
	void *res;
	pthread_join(t, &res);
	CHECK((intptr_t)res == TAILNODE_CLOSED);
	OK(tailnode_op_wait(op, 30000, NULL, &err));

	OK(tailnode_close(n, &err));
	int code;
	while ((code = tailnode_read_event(w, &ev, &err)) == 0)
		;
	WANT(code, TAILNODE_CLOSED);
	close(w);
	printf("calls: ok\n");
	return 0;
}
