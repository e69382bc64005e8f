// helper.c - isolated mode: a helper that dies is told, and started again with the same identity; it ends with its host, however that ends; the
// host may fork as it likes.
#include "check.h"

#include <dirent.h>
#include <sched.h>
#include <stdint.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

static pid_t helper_of(tailnode_node n) {
	tailnode_stats st = {.size = sizeof st};
	OK(tailnode_runtime_stats(n, &st, &err));
	CHECK(st.pid > 0 && st.pid != getpid() && st.crossings == 0);
	return (pid_t)st.pid;
}

static void nothing(void *user, int level, const char *text, size_t len) {
	(void)user, (void)level, (void)text, (void)len;
}

static int entries(const char *dir) {
	int n = 0;
	DIR *d = opendir(dir);
	while (d && readdir(d))
		n++;
	if (d)
		closedir(d);
	return n;
}

static void await_end(pid_t pid) { // it is not our child: init, or a subreaper, reaps it
	for (int i = 0; kill(pid, 0) == 0; i++) {
		char path[64], state = 0;
		snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
		FILE *f = fopen(path, "r");
		if (f) {
			if (fscanf(f, "%*d %*s %c", &state) != 1)
				state = 0;
			fclose(f);
		}
		snprintf(path, sizeof path, "/proc/%d/task", (int)pid);
		if (state == 'Z' && entries(path) <= 3) // its last thread; and nobody reaps here
			return;
		CHECK(i < 30000);
		poll(NULL, 0, 1);
	}
}

static void echo(int fd) {
	char b[4];
	write_all(fd, "ping", 4);
	read_all(fd, b, 4);
	CHECK(!memcmp(b, "ping", 4));
}

// A host, in a process of its own: tells its helper's process, and then does as it is told.
static int host(const char *end) {
	tailnode_options o = options("chost");
	tailnode_node n;
	int fd, ln;
	o.mode = TAILNODE_ISOLATED;
	OK(tailnode_new(&o, &n, &err));
	OK(tailnode_up(n, 30000, &err));
	OK(tailnode_dial(n, "tcp", "gopeer:7", 0, 30000, &fd, NULL, NULL, &err));
	OK(tailnode_listen(n, "tcp", ":80", 0, &ln, NULL, &err));
	echo(fd);
	pid_t pid = helper_of(n), child = 0;
	if (!strcmp(end, "child")) { // a child that outlives it, with copies of its descriptors
		child = fork();
		if (child == 0) {
			close(1);
			for (;;)
				pause();
		}
	}
	pid_t told[2] = {pid, child};
	CHECK(write(1, told, sizeof told) == sizeof told);
	if (!strcmp(end, "exit"))
		exit(0);
	if (!strcmp(end, "exec")) {
		execl("/bin/sleep", "sleep", "60", (char *)NULL);
		_exit(1);
	}
	if (!strcmp(end, "abort"))
		abort();
	for (;;)
		pause();
}

static void ends(const char *self, const char *end) {
	int p[2];
	pid_t told[2];
	CHECK(pipe2(p, O_CLOEXEC) == 0);
	pid_t pid = fork();
	CHECK(pid >= 0);
	if (pid == 0) {
		dup2(p[1], 1);
		execl(self, self, "--host", end, (char *)NULL);
		_exit(1);
	}
	close(p[1]);
	CHECK(read(p[0], told, sizeof told) == sizeof told);
	close(p[0]);
	if (strcmp(end, "exit") && strcmp(end, "abort") && strcmp(end, "exec"))
		CHECK(kill(pid, SIGKILL) == 0);
	await_end(told[0]);
	if (!strcmp(end, "exec"))
		CHECK(kill(pid, SIGKILL) == 0);
	if (told[1])
		CHECK(kill(told[1], SIGKILL) == 0);
	CHECK(waitpid(pid, NULL, 0) == pid);
}

// Children come and go in the middle of a transfer, and one of them keeps copies of all descriptors.
static void forks(void) {
	tailnode_options o = options("cforks");
	tailnode_node n;
	int fd, sink;
	o.mode = TAILNODE_ISOLATED;
	OK(tailnode_new(&o, &n, &err));
	OK(tailnode_dial(n, "tcp", "gopeer:7", 0, 30000, &fd, NULL, NULL, &err));
	OK(tailnode_dial(n, "tcp", "gopeer:9", 0, 30000, &sink, NULL, NULL, &err));
	static char block[1 << 16];
	pid_t keeper = fork();
	CHECK(keeper >= 0);
	if (keeper == 0)
		for (;;)
			pause();
	for (int i = 0; i < 100; i++) {
		write_all(sink, block, sizeof block);
		pid_t pid = fork();
		CHECK(pid >= 0);
		if (pid == 0) {
			alarm(60);
			WANT(tailnode_start(n, &err), TAILNODE_FORKED);
			_exit(0);
		}
		echo(fd);
		int st;
		CHECK(waitpid(pid, &st, 0) == pid && st == 0);
	}
	CHECK(shutdown(sink, SHUT_WR) == 0);
	unsigned char count[8];
	read_all(sink, count, 8);
	CHECK(count[5] == (100 << 16) >> 16 && !count[6] && !count[7]);
	pid_t pid = helper_of(n);
	OK(tailnode_close(n, &err));
	await_end(pid); // although the child has copies
	CHECK(kill(keeper, SIGKILL) == 0 && waitpid(keeper, NULL, 0) == keeper);
	CHECK(waitpid(-1, NULL, WNOHANG) == -1 && errno == ECHILD);
	close(fd);
	close(sink);
}

// A fork while the library closes its end of the helper's socket. close(2) is this program's, and waits there until the fork has been made, or waits itself.
static volatile pid_t forker; // 0: nobody forks
static volatile int closes, forked;

int close(int fd) {
	int type = 0;
	socklen_t len = sizeof type;
	if (__atomic_load_n(&forker, __ATOMIC_ACQUIRE) && getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &len) == 0 && type == SOCK_SEQPACKET) {
		char path[64], state = 0;
		snprintf(path, sizeof path, "/proc/self/task/%d/stat", (int)forker);
		__atomic_store_n(&closes, 1, __ATOMIC_RELEASE);
		while (!__atomic_load_n(&forked, __ATOMIC_ACQUIRE) && state != 'S') {
			FILE *f = fopen(path, "r");
			CHECK(f && fscanf(f, "%*d %*s %c", &state) == 1);
			fclose(f);
			sched_yield();
		}
	}
	return (int)syscall(SYS_close, fd);
}

static void *close_node(void *p) { return (void *)(intptr_t)tailnode_close(*(tailnode_node *)p, NULL); }

static void fork_in_close(void) {
	tailnode_options o = options("cforks");
	tailnode_node n;
	pthread_t t;
	void *code;
	o.mode = TAILNODE_ISOLATED;
	OK(tailnode_new(&o, &n, &err));
	pid_t pid = helper_of(n);
	__atomic_store_n(&forker, getpid(), __ATOMIC_RELEASE); // the main thread
	CHECK(pthread_create(&t, NULL, close_node, &n) == 0);
	while (!__atomic_load_n(&closes, __ATOMIC_ACQUIRE))
		; // awake, so that to be asleep is to wait in fork
	pid_t child = fork();
	CHECK(child >= 0);
	if (child == 0)
		for (;;)
			pause();
	__atomic_store_n(&forked, 1, __ATOMIC_RELEASE);
	CHECK(pthread_join(t, &code) == 0 && code == NULL);
	__atomic_store_n(&forker, 0, __ATOMIC_RELEASE);
	await_end(pid);
	CHECK(waitpid(child, NULL, WNOHANG) == 0 && kill(child, SIGKILL) == 0 && waitpid(child, NULL, 0) == child);
}

// A host whose children orphans become, as the first process of a container: no helper stays behind but the last, and the host's own children are left alone.
static int subreaper(void) {
	tailnode_options o = options("creaper");
	tailnode_node n;
	pid_t pid = 0, last = 0, own = fork();
	int st;
	CHECK(own >= 0);
	if (own == 0)
		_exit(7);
	CHECK(prctl(PR_SET_CHILD_SUBREAPER, 1) == 0);
	o.mode = TAILNODE_ISOLATED;
	o.flags |= TAILNODE_RESTART;
	for (int i = 0; i < 5; i++) {
		OK(tailnode_new(&o, &n, &err));
		CHECK(!last || (kill(last, 0) < 0 && errno == ESRCH));
		pid = helper_of(n);
		CHECK(kill(pid, SIGKILL) == 0);
		await_end(pid);
		OK(tailnode_start(n, &err)); // by another
		CHECK(kill(pid, 0) < 0 && errno == ESRCH);
		last = helper_of(n);
		OK(tailnode_close(n, &err));
		await_end(last);
	}
	CHECK(waitpid(own, &st, 0) == own && WEXITSTATUS(st) == 7);
	pid = waitpid(-1, NULL, 0);
	CHECK(pid == last || (pid < 0 && errno == ECHILD)); // it may have been quicker than the library's look
	CHECK(waitpid(-1, NULL, 0) < 0 && errno == ECHILD);
	return 0;
}

int main(int argc, char **argv) {
	alarm(120);
	if (argc > 2 && !strcmp(argv[1], "--host"))
		return host(argv[2]);
	if (argc > 1 && !strcmp(argv[1], "--subreaper"))
		return subreaper();
	static const char *const how[] = {"kill", "exit", "abort", "exec", "child"};
	for (size_t i = 0; i < sizeof how / sizeof *how; i++)
		ends(argv[0], how[i]);
	char command[4200];
	snprintf(command, sizeof command, "%s --subreaper", argv[0]);
	CHECK(system(command) == 0);
	forks();
	fork_in_close();
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
	CHECK(code == TAILNODE_CORE_LOST); // never that the node was closed
	close(w);
	WANT(tailnode_op_wait(op, 30000, NULL, &err), TAILNODE_CORE_LOST);
	await_end((pid_t)st.pid); // what is sent while it dies is lost with it
	// The next call finds a new helper, and the node is the same.
	OK(tailnode_up(n, 30000, &err));
	OK(tailnode_addresses(n, &after, NULL, &err));
	CHECK(!memcmp(&before, &after, sizeof after));
	pid_t old = (pid_t)st.pid;
	OK(tailnode_runtime_stats(n, &st, &err));
	CHECK(st.pid != old);
	// As often as it dies, and nothing is left of it.
	int fds = entries("/proc/self/fd");
	for (int i = 0; i < 10; i++) {
		CHECK(kill((pid_t)st.pid, SIGKILL) == 0);
		await_end((pid_t)st.pid);
		OK(tailnode_up(n, 30000, &err));
		OK(tailnode_runtime_stats(n, &st, &err));
	}
	OK(tailnode_addresses(n, &after, NULL, &err));
	CHECK(!memcmp(&before, &after, sizeof after) && entries("/proc/self/fd") == fds);
	OK(tailnode_close(n, &err));
	// The helper ends with its node.
	await_end((pid_t)st.pid);
	// Without TAILNODE_RESTART it is told, and stays so.
	o.flags = TAILNODE_STATE_MEMORY;
	OK(tailnode_new(&o, &n, &err));
	OK(tailnode_runtime_stats(n, &st, &err));
	CHECK(kill((pid_t)st.pid, SIGKILL) == 0);
	while ((code = tailnode_start(n, &err)) == 0)
		;
	WANT(tailnode_start(n, &err), TAILNODE_CORE_LOST);
	tailnode_close(n, &err);
	o.helper_path = "/nonexistent/helper";
	WANT(tailnode_new(&o, &n, &err), TAILNODE_UNSUPPORTED);
	// A helper that is another program: with callbacks and without, and with nobody to close the node.
	o.helper_path = "/bin/true";
	o.log = nothing;
	WANT(tailnode_new(&o, &n, &err), TAILNODE_CORE_LOST);
	o.log = NULL;
	WANT(tailnode_new(&o, &n, &err), TAILNODE_CORE_LOST);
	OK(tailnode_new_start(&o, &n, &op, &err));
	WANT(tailnode_op_wait(op, 30000, NULL, &err), TAILNODE_CORE_LOST);
	tailnode_close(n, &err);
	printf("helper: ok\n");
	char rm[100];
	snprintf(rm, sizeof rm, "rm -rf %s", dir);
	return system(rm);
}
