// starts.c - the calls that do not wait: with a core that does not take requests, with one that is not there, and all of them once.
#include "check.h"

static void finish(tailnode_op op, tailnode_result *r) {
	memset(r, 0, sizeof *r);
	r->size = sizeof *r;
	wait_in(tailnode_op_fd(op), 30000);
	OK(tailnode_op_take(op, r, &err));
}

static void each(tailnode_node n) {
	tailnode_op op;
	tailnode_result r;
	OK(tailnode_start_start(n, &op, &err));
	finish(op, &r);
	OK(tailnode_up_start(n, 30000, &op, &err));
	finish(op, &r);
	OK(tailnode_addresses_start(n, &op, &err));
	finish(op, &r);
	CHECK(r.local.family == 4 && r.remote.family == 6);

	OK(tailnode_runtime_stats_start(n, &op, &err));
	finish(op, &r);
	tailnode_stats *st = (tailnode_stats *)(void *)r.data, again = {.size = sizeof again};
	CHECK(r.data_len == sizeof *st && st->size == sizeof *st && st->nodes == 1 && st->pid > 0);
	OK(tailnode_runtime_stats(n, &again, &err));
	CHECK(again.pid == st->pid && again.calls == st->calls + 1);
	tailnode_free(r.data);

	OK(tailnode_loopback_start(n, &op, &err));
	finish(op, &r);
	tailnode_loopback_info *li = (tailnode_loopback_info *)(void *)r.data, same = {.size = sizeof same};
	CHECK(r.data_len == sizeof *li && li->size == sizeof *li && !strncmp(li->address, "127.0.0.1:", 10));
	CHECK(strlen(li->proxy_credential) == 32 && strlen(li->local_api_credential) == 32 && strcmp(li->proxy_credential, li->local_api_credential));
	OK(tailnode_loopback(n, &same, &err));
	CHECK(!memcmp(&same, li, sizeof same));
	tailnode_free(r.data);

	OK(tailnode_set_memory_limit_start(n, 300 << 20, &op, &err));
	finish(op, &r);
	OK(tailnode_set_max_procs_start(n, 1, &op, &err));
	finish(op, &r);
	OK(tailnode_set_gc_percent_start(n, 50, &op, &err));
	finish(op, &r);
	OK(tailnode_memory_pressure_start(n, 1, &op, &err));
	finish(op, &r);
	OK(tailnode_trim_start(n, &op, &err));
	finish(op, &r);
	OK(tailnode_runtime_stats(n, &again, &err));
	CHECK(again.memory_limit == 300 << 20 && again.max_procs == 1);
	WANT(tailnode_set_max_procs_start(n, 0, &op, &err), TAILNODE_INVALID_ARGUMENT);
	WANT(tailnode_trim_start(n, NULL, &err), TAILNODE_INVALID_ARGUMENT);

	OK(tailnode_listen_start(n, "tcp", ":80", 0, &op, &err));
	finish(op, &r);
	CHECK(r.fd >= 0 && r.local.port == 80);
	close(r.fd);
	OK(tailnode_listen_packet_start(n, "udp", ":0", TAILNODE_NONBLOCK, &op, &err));
	finish(op, &r);
	CHECK(r.fd >= 0 && r.local.port && (fcntl(r.fd, F_GETFL) & O_NONBLOCK));
	close(r.fd);
	OK(tailnode_watch_start(n, 0, &op, &err));
	finish(op, &r);
	tailnode_event ev;
	OK(tailnode_read_event(r.fd, &ev, &err));
	CHECK(ev.kind == TAILNODE_EVENT_STATE && ev.state == TAILNODE_STATE_RUNNING);
	close(r.fd);
	tailnode_addr peer;
	OK(tailnode_dial_start(n, "tcp", "gopeer:7", 0, 30000, &op, &err));
	finish(op, &r);
	peer = r.remote;
	close(r.fd);
	peer.port = 0;
	char ip[TAILNODE_ADDR_TEXT];
	OK(tailnode_addr_format(&peer, ip, sizeof ip));
	OK(tailnode_whois_start(n, ip, 30000, &op, &err));
	finish(op, &r);
	CHECK(strstr(r.data, "gopeer"));
	tailnode_free(r.data);
	OK(tailnode_ping_start(n, ip, "TSMP", 30000, &op, &err));
	finish(op, &r);
	CHECK(strstr(r.data, "LatencySeconds"));
	tailnode_free(r.data);
}

// More requests at a time than the core's socket takes: each starts or says why not, and none waits.
static void flood(tailnode_node n, int stopped) {
	enum { MOST = 1000 };
	static tailnode_op ops[MOST];
	int started = 0, refused = 0;
	for (int i = 0; i < MOST; i++) {
		int code = tailnode_addresses_start(n, &ops[started], &err);
		if (code == 0) {
			started++;
			continue;
		}
		WANT(code, TAILNODE_EXHAUSTED);
		if (err.sys_errno == EAGAIN)
			refused++;
		else
			CHECK(err.sys_errno == EMFILE || err.sys_errno == ETOOMANYREFS);
		if (refused > 10)
			break;
	}
	CHECK(started > 100 && (!stopped || refused));
	if (stopped) {
		// Nothing is answered, nothing blocks; and a call that waits can wait.
		WANT(tailnode_op_take(ops[0], NULL, &err), TAILNODE_PENDING);
		WANT(tailnode_op_wait(ops[0], 1, NULL, &err), TAILNODE_PENDING);
		for (int i = 0; i < 10; i++)
			OK(tailnode_op_cancel(ops[--started]));
		CHECK(kill(stopped, SIGCONT) == 0);
	}
	for (int i = 0; i < started; i++) {
		tailnode_result r;
		finish(ops[i], &r);
	}
	tailnode_stats st = {.size = sizeof st};
	OK(tailnode_runtime_stats(n, &st, &err));
	printf("starts: %d under way at a time, %d told to come back\n", started, refused);
}

static void on_log(void *user, int level, const char *text, size_t len) {
	(void)level, (void)text, (void)len;
	poll(NULL, 0, 5); // a callback that takes its time
	CHECK(!__atomic_load_n((int *)user, __ATOMIC_SEQ_CST));
}

// Closed while its core is being started: no callback runs when the close is over.
static void close_at_the_start(void) {
	enum { ROUNDS = 100 };
	static int over[ROUNDS];
	for (int i = 0; i < ROUNDS; i++) {
		tailnode_options o = options("cstarts3");
		tailnode_node m;
		tailnode_op made, start, end;
		o.log = on_log;
		o.user = &over[i];
		o.log_level = TAILNODE_LOG_DEBUG;
		o.control_url = "http://127.0.0.1:1";
		OK(tailnode_new_start(&o, &m, &made, &err));
		OK(tailnode_start_start(m, &start, &err));
		for (volatile int spin = 0; spin < i * 20000; spin++) // at another moment each time
			;
		OK(tailnode_close_start(m, &end, &err));
		OK(tailnode_op_wait(end, 30000, NULL, &err));
		__atomic_store_n(&over[i], 1, __ATOMIC_SEQ_CST);
		tailnode_op_cancel(made);
		tailnode_op_cancel(start);
	}
	tailnode_node late = up("cstarts4"); // time for a callback that comes too late
	OK(tailnode_close(late, &err));
}

int main(void) {
	alarm(120);
	tailnode_options o = options("cstarts");
	tailnode_node n, m;
	tailnode_op op, op2, op3;
	tailnode_result r;

	// A core that is not there: known at the end of the operation, or never asked for.
	if (isolated()) {
		o.helper_path = "/nonexistent/helper";
		OK(tailnode_new_start(&o, &m, &op, &err));
		WANT(tailnode_op_wait(op, 30000, NULL, &err), TAILNODE_UNSUPPORTED);
		CHECK(strstr(err.message, "/nonexistent/helper"));
		WANT(tailnode_start(m, &err), TAILNODE_UNSUPPORTED);
		OK(tailnode_close(m, &err));
		WANT(tailnode_close(m, &err), TAILNODE_CLOSED);
		o.helper_path = NULL;
	}
	WANT(tailnode_new_start(&o, NULL, &op, &err), TAILNODE_INVALID_ARGUMENT);
	WANT(tailnode_new_start(NULL, &n, &op, &err), TAILNODE_INVALID_ARGUMENT);

	// The handle can be used before the core is there; the order is kept.
	OK(tailnode_new_start(&o, &n, &op, &err));
	OK(tailnode_up_start(n, 30000, &op2, &err));
	OK(tailnode_status_start(n, 0, &op3, &err));
	finish(op, &r);
	finish(op2, &r);
	finish(op3, &r);
	tailnode_free(r.data);
	each(n);
	flood(n, 0);

	// Closed, cancelled and forgotten before it began.
	for (int i = 0; i < 30; i++) {
		o.hostname = "cstarts2";
		OK(tailnode_new_start(&o, &m, &op, &err));
		if (i % 3 == 0)
			OK(tailnode_op_cancel(op));
		if (i % 2) {
			OK(tailnode_up_start(m, 30000, &op2, &err));
			OK(tailnode_close_start(m, &op3, &err));
			int code = tailnode_op_wait(op3, 30000, NULL, &err);
			CHECK(code == 0);
			code = tailnode_op_wait(op2, 30000, NULL, &err);
			CHECK(code == 0 || code == TAILNODE_CLOSED);
		} else {
			OK(tailnode_close(m, &err));
		}
		WANT(tailnode_start(m, &err), TAILNODE_CLOSED);
		if (i % 3) {
			int code = tailnode_op_wait(op, 30000, NULL, &err);
			CHECK(code == 0 || code == TAILNODE_CLOSED);
		}
	}

	close_at_the_start();

	if (isolated()) {
		tailnode_stats st = {.size = sizeof st};
		OK(tailnode_runtime_stats(n, &st, &err));
		CHECK(kill((pid_t)st.pid, SIGSTOP) == 0); // a helper that gets no processor time
		for (char path[64], state = 0; state != 'T';) {
			snprintf(path, sizeof path, "/proc/%d/stat", (int)st.pid);
			FILE *f = fopen(path, "r");
			CHECK(f && fscanf(f, "%*d %*s %c", &state) == 1);
			fclose(f);
		}
		flood(n, (int)st.pid);
		// A helper that has died: the call that finds out does not wait for the next one.
		OK(tailnode_close(n, &err));
		o.flags |= TAILNODE_RESTART;
		OK(tailnode_new(&o, &n, &err));
		OK(tailnode_runtime_stats(n, &st, &err));
		CHECK(kill((pid_t)st.pid, SIGKILL) == 0);
		int code;
		do { // requests sent before it was quite dead are lost with it
			OK(tailnode_runtime_stats_start(n, &op, &err));
			memset(&r, 0, sizeof r);
			r.size = sizeof r;
			code = tailnode_op_wait(op, 30000, &r, &err);
		} while (code == TAILNODE_CORE_LOST);
		CHECK(code == 0 && ((tailnode_stats *)(void *)r.data)->pid != st.pid);
		tailnode_free(r.data);
	}
	OK(tailnode_close_start(n, &op, &err));
	WANT(tailnode_start(n, &err), TAILNODE_CLOSED);
	finish(op, &r);
	printf("starts: ok\n");
	return 0;
}
