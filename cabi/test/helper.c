// helper.c - isolated mode: a helper that dies is told, and started again with the same identity.
#include "check.h"

int main(void) {
	alarm(60);
	char dir[] = "/tmp/tailnode-helper-XXXXXX";
	CHECK(mkdtemp(dir));
	tailnode_options o = options("chelper");
	o.mode = TAILNODE_ISOLATED;
	o.flags = TAILNODE_RESTART;
	o.dir = dir;
	tailnode_node n;
	OK(tailnode_new(&o, &n, &err));
	OK(tailnode_up(n, 30000, &err));
	tailnode_addr before, after;
	OK(tailnode_addresses(n, &before, NULL, &err));
	tailnode_stats st = {.size = sizeof st};
	OK(tailnode_runtime_stats(n, &st, &err));
	CHECK(st.pid > 0 && st.pid != getpid());
	int fd, w;
	OK(tailnode_dial(n, "tcp", "gopeer:7", 0, 30000, &fd, NULL, NULL, &err));
	OK(tailnode_watch(n, 0, &w, &err));
	tailnode_event ev;
	OK(tailnode_read_event(w, &ev, &err));
	tailnode_op op;
	OK(tailnode_dial_start(n, "tcp", "100.127.3.4:80", 0, TAILNODE_FOREVER, &op, &err));
	CHECK(kill((pid_t)st.pid, SIGKILL) == 0);
	char b;
	CHECK(read(fd, &b, 1) < 0 && errno == ECONNRESET); // never an end of file
	close(fd);
	int code;
	while ((code = tailnode_read_event(w, &ev, &err)) == 0)
		;
	CHECK(code == TAILNODE_CLOSED || code == TAILNODE_CORE_LOST);
	close(w);
	WANT(tailnode_op_wait(op, 10000, NULL, &err), TAILNODE_CORE_LOST);
	// The next call finds a new helper, and the node is the same.
	OK(tailnode_up(n, 30000, &err));
	OK(tailnode_addresses(n, &after, NULL, &err));
	CHECK(!memcmp(&before, &after, sizeof after));
	pid_t old = (pid_t)st.pid;
	OK(tailnode_runtime_stats(n, &st, &err));
	CHECK(st.pid != old);
	OK(tailnode_close(n, &err));
	// The helper ends with its node.
	for (int i = 0; kill((pid_t)st.pid, 0) == 0; i++) {
		CHECK(i < 5000);
		poll(NULL, 0, 1);
	}
	// Without TAILNODE_RESTART it is told, and stays so.
	o.flags = TAILNODE_STATE_MEMORY;
	OK(tailnode_new(&o, &n, &err));
	OK(tailnode_runtime_stats(n, &st, &err));
	CHECK(kill((pid_t)st.pid, SIGKILL) == 0);
	for (int i = 0; (code = tailnode_start(n, &err)) == 0; i++)
		CHECK(i < 1000);
	WANT(tailnode_start(n, &err), TAILNODE_CORE_LOST);
	tailnode_close(n, &err);
	o.helper_path = "/nonexistent/helper";
	WANT(tailnode_new(&o, &n, &err), TAILNODE_UNSUPPORTED);
	printf("helper: ok\n");
	char rm[100];
	snprintf(rm, sizeof rm, "rm -rf %s", dir);
	return system(rm);
}
