// callbacks.c - an interactive login, told by a callback and by a watch; lines on a descriptor; the events of a watch.
#include "check.h"

#include <stdint.h>

static pthread_mutex_t mu = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t cond = PTHREAD_COND_INITIALIZER;
static char url[1024];
static int urls, closed;
static tailnode_node node;

static void on_url(void *user, const char *text) {
	tailnode_addr a;
	tailnode_error e;
	CHECK(user == &urls && !strncmp(text, "http", 4) && !closed);
	sigset_t mask;
	CHECK(pthread_sigmask(SIG_BLOCK, NULL, &mask) == 0 && sigismember(&mask, SIGTERM) && sigismember(&mask, SIGPIPE));
	CHECK(tailnode_addresses(node, &a, NULL, &e) == 0); // a callback may call
	pthread_mutex_lock(&mu);
	snprintf(url, sizeof url, "%s", text);
	urls++;
	pthread_cond_broadcast(&cond);
	pthread_mutex_unlock(&mu);
}

static struct {
	int entered, go, cancel, over;
	tailnode_op op;
} slow_log;

static void on_slow_log(void *user, int level, const char *text, size_t len) {
	(void)user, (void)level, (void)text, (void)len;
	pthread_mutex_lock(&mu);
	CHECK(!slow_log.over);
	slow_log.entered = 1;
	pthread_cond_broadcast(&cond);
	while (!slow_log.go)
		pthread_cond_wait(&cond, &mu);
	int cancel = slow_log.cancel;
	slow_log.cancel = 0;
	pthread_mutex_unlock(&mu);
	if (cancel)
		CHECK(tailnode_op_cancel(slow_log.op) == 0);
}

static void *wait_for_close(void *p) {
	(void)p;
	tailnode_error e;
	return (void *)(intptr_t)tailnode_op_wait(slow_log.op, 60000, NULL, &e);
}

// While a callback runs, the end of its node's close does not come, and nobody who asks for it waits for the callback, nor the callback for them.
static void close_during_a_callback(void) {
	for (int cancel = 0; cancel < 2; cancel++) {
		tailnode_options o = options("cslow");
		tailnode_node n;
		tailnode_event ev;
		pthread_t t;
		void *res;
		int w, code;
		memset(&slow_log, 0, sizeof slow_log);
		o.auth_key = getenv("TEST_KEY");
		o.log = on_slow_log;
		o.log_level = TAILNODE_LOG_DEBUG;
		OK(tailnode_new(&o, &n, &err));
		OK(tailnode_watch(n, 0, &w, &err));
		OK(tailnode_up(n, 30000, &err));
		pthread_mutex_lock(&mu);
		while (!slow_log.entered)
			pthread_cond_wait(&cond, &mu);
		pthread_mutex_unlock(&mu);
		OK(tailnode_close_start(n, &slow_log.op, &err));
		while ((code = tailnode_read_event(w, &ev, &err)) == 0) // the core is at it
			;
		WANT(code, TAILNODE_CLOSED);
		close(w);
		WANT(tailnode_op_wait(slow_log.op, 200, NULL, &err), TAILNODE_PENDING);
		WANT(tailnode_op_take(slow_log.op, NULL, &err), TAILNODE_PENDING);
		struct pollfd p = {.fd = tailnode_op_fd(slow_log.op), .events = POLLIN};
		CHECK(poll(&p, 1, 0) == 0);
		if (cancel)
			CHECK(pthread_create(&t, NULL, wait_for_close, NULL) == 0);
		pthread_mutex_lock(&mu);
		slow_log.go = 1;
		slow_log.cancel = cancel;
		pthread_cond_broadcast(&cond);
		pthread_mutex_unlock(&mu);
		if (cancel) {
			pthread_join(t, &res);
			CHECK((intptr_t)res == TAILNODE_CANCELED || (intptr_t)res == TAILNODE_CLOSED); // closed: it came too late to find it
		} else {
			wait_in(p.fd, 30000);
			OK(tailnode_op_take(slow_log.op, NULL, &err));
			pthread_mutex_lock(&mu);
			slow_log.over = 1;
			pthread_mutex_unlock(&mu);
		}
	}
}

int main(int argc, char **argv) {
	alarm(120);
	(void)argc;
	if (getenv("TS_AUTHKEY")) { // a program without a key in its environment
		setenv("TEST_KEY", getenv("TS_AUTHKEY"), 1);
		unsetenv("TS_AUTHKEY");
		execv(argv[0], argv);
		FAIL("execv: %s", strerror(errno));
	}
	tailnode_options o = options("cadmin");
	tailnode_node admin;
	setenv("TS_AUTHKEY", getenv("TEST_KEY"), 1); // set while the program runs, and seen
	OK(tailnode_new(&o, &admin, &err));
	unsetenv("TS_AUTHKEY");
	OK(tailnode_up(admin, 30000, &err));
	int theirs, slow;
	tailnode_event ev;
	OK(tailnode_watch(admin, TAILNODE_NONBLOCK, &theirs, &err));
	OK(tailnode_watch(admin, 0, &slow, &err)); // not read until the end
	while (tailnode_read_event(theirs, &ev, &err) == 0)
		CHECK(ev.state == TAILNODE_STATE_RUNNING);

	int lines[2], w, w2;
	CHECK(pipe(lines) == 0);
	o = options("clogin");
	o.auth_url = on_url;
	o.user = &urls;
	o.log_fd = lines[1];
	o.log_level = TAILNODE_LOG_DEBUG;
	OK(tailnode_new(&o, &node, &err));
	close(lines[1]); // the library has its own
	OK(tailnode_watch(node, 0, &w, &err));
	tailnode_op op;
	OK(tailnode_up_start(node, 60000, &op, &err));
	pthread_mutex_lock(&mu);
	while (!urls)
		pthread_cond_wait(&cond, &mu);
	pthread_mutex_unlock(&mu);
	int told = 0;
	do { // that there is a URL, and that the state is such
		OK(tailnode_read_event(w, &ev, &err));
		if (ev.kind == TAILNODE_EVENT_AUTH_URL) {
			CHECK(!told++ && ev.text_len == strlen(ev.text));
			if (strcmp(ev.text, url))
				FAIL("the watch tells %s, the callback %s", ev.text, url);
		}
	} while (!told || ev.state != TAILNODE_STATE_NEEDS_LOGIN);
	char *json;
	OK(tailnode_status(node, 0, &json, NULL, &err));
	CHECK(strstr(json, "\"NeedsLogin\"") && strstr(json, url));
	tailnode_free(json);
	WANT(tailnode_up(node, 1, &err), TAILNODE_TIMEOUT);
	WANT(tailnode_op_take(op, NULL, &err), TAILNODE_PENDING);

	// Listens on an address, which wait for the node to run, and are given up: they take no port when it does.
	tailnode_addr next; // the one that it will have
	tailnode_stats st = {.size = sizeof st};
	char addr[TAILNODE_ADDR_TEXT];
	OK(tailnode_addresses(admin, &next, NULL, &err));
	next.ip[3]++;
	next.port = 80;
	OK(tailnode_addr_format(&next, addr, sizeof addr));
	OK(tailnode_runtime_stats(node, &st, &err));
	int64_t before = (int64_t)st.calls_in_flight;
	tailnode_op given_up[40], kept[2];
	for (int i = 0; i < 40; i++)
		OK(i % 2 ? tailnode_listen_start(node, "tcp", addr, 0, &given_up[i], &err) : tailnode_listen_packet_start(node, "udp", addr, 0, &given_up[i], &err));
	do
		OK(tailnode_runtime_stats(node, &st, &err));
	while ((int64_t)st.calls_in_flight < before + 40);
	for (int i = 0; i < 40; i++)
		OK(tailnode_op_cancel(given_up[i]));
	do // an alarm if they stay
		OK(tailnode_runtime_stats(node, &st, &err));
	while ((int64_t)st.calls_in_flight > before);
	OK(tailnode_listen_start(node, "tcp", addr, 0, &kept[0], &err));
	OK(tailnode_listen_packet_start(node, "udp", addr, 0, &kept[1], &err));
	WANT(tailnode_listen(node, "tcp6", addr, 0, &w2, NULL, &err), TAILNODE_INVALID_ARGUMENT); // at once

	int fd; // somebody visits it
	char answer[200] = {0};
	OK(tailnode_dial(admin, "tcp", "gopeer:21", 0, 30000, &fd, NULL, NULL, &err));
	write_all(fd, url, strlen(url));
	CHECK(shutdown(fd, SHUT_WR) == 0);
	ssize_t n = read(fd, answer, sizeof answer - 1);
	if (n != 2 || strcmp(answer, "ok"))
		FAIL("%s", answer);
	close(fd);
	OK(tailnode_op_wait(op, 60000, NULL, &err));
	for (int i = 0; i < 2; i++) {
		tailnode_result r = {.size = sizeof r};
		OK(tailnode_op_wait(kept[i], 30000, &r, &err));
		CHECK(!memcmp(&r.local, &next, sizeof next));
		close(r.fd);
	}
	while (ev.state != TAILNODE_STATE_RUNNING)
		OK(tailnode_read_event(w, &ev, &err));
	CHECK(urls == 1);

	// The other node's watch tells that the netmap changed, and status who came.
	for (int known = 0; !known;) {
		wait_in(theirs, 30000);
		OK(tailnode_read_event(theirs, &ev, &err));
		if (ev.kind != TAILNODE_EVENT_NETMAP)
			continue;
		OK(tailnode_status(admin, 1, &json, NULL, &err));
		known = strstr(json, "\"clogin\"") != NULL;
		tailnode_free(json);
	}

	// A descriptor for lines that nobody reads any more holds nothing up.
	char text[4096];
	n = read(lines[0], text, sizeof text);
	CHECK(n > 0 && (memmem(text, (size_t)n, "level=", 6)));
	int full[2];
	CHECK(pipe(full) == 0 && fcntl(full[1], F_SETFL, O_NONBLOCK) == 0);
	while (write(full[1], text, sizeof text) > 0)
		;
	CHECK(fcntl(full[1], F_SETFL, 0) == 0);
	o = options("cfull");
	o.auth_key = getenv("TEST_KEY");
	o.log_fd = full[1];
	o.log_level = TAILNODE_LOG_DEBUG;
	tailnode_node quiet;
	OK(tailnode_new(&o, &quiet, &err));
	OK(tailnode_up(quiet, 30000, &err));
	OK(tailnode_close(quiet, &err));

	close_during_a_callback();

	OK(tailnode_close_start(node, &op, &err)); // the end of the operation is that of the callbacks, too
	OK(tailnode_op_wait(op, 30000, NULL, &err));
	closed = 1;
	int code, events = 0;
	while ((code = tailnode_read_event(w, &ev, &err)) == 0)
		;
	WANT(code, TAILNODE_CLOSED);
	while (read(lines[0], text, sizeof text) > 0) // ends: the library's duplicate is closed
		;
	OK(tailnode_close(admin, &err));
	while ((code = tailnode_read_event(slow, &ev, &err)) == 0)
		CHECK(events++ || ev.kind == TAILNODE_EVENT_STATE);
	CHECK(events > 1);
	WANT(code, TAILNODE_CLOSED);
	printf("callbacks: ok\n");
	return 0;
}
