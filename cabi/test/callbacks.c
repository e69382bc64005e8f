// callbacks.c - an interactive login, told by a callback and by a watch; lines on a descriptor; the events of a watch.
#include "check.h"

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

	int lines[2], w;
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
