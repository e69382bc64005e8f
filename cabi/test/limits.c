// limits.c - what becomes of a host that may have no more threads (RLIMIT_NPROC, and the pids controller of cgroups where this program
// may make one): an error, or in process a clear end, and never a hang. And whose memory is whose in the process's map.
#include "check.h"

#include <linux/capability.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>

static char cgroup[200];

static int put_text(const char *dir, const char *file, const char *text) {
	char path[300];
	snprintf(path, sizeof path, "%s/%s", dir, file);
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : write(fd, text, strlen(text));
	close(fd);
	return n < 0 ? -1 : 0;
}

// From now on pid, this process or its helper, gets no more threads and processes.
static int by_rlimit(pid_t pid) {
	if (getuid() == 0) { // root has no such limit: another real user, without the capabilities
		struct __user_cap_header_struct h = {_LINUX_CAPABILITY_VERSION_3, 0};
		struct __user_cap_data_struct d[2];
		CHECK(syscall(SYS_setresuid, 54321, 0, 0) == 0 && syscall(SYS_capget, &h, d) == 0);
		d[0].effective &= ~(1u << CAP_SYS_ADMIN | 1u << CAP_SYS_RESOURCE);
		CHECK(syscall(SYS_capset, &h, d) == 0);
	}
	struct rlimit none = {0, 0};
	return prlimit(pid, RLIMIT_NPROC, &none, NULL);
}

static int by_cgroup(pid_t pid) {
	char text[32];
	snprintf(text, sizeof text, "%d", (int)pid);
	return put_text(cgroup, "cgroup.procs", text) || put_text(cgroup, "pids.max", "1") ? -1 : 0;
}

static int make_cgroup(void) {
	static const char *const at[] = {"/sys/fs/cgroup/pids", "/sys/fs/cgroup"};
	for (size_t i = 0; i < 2; i++) {
		snprintf(cgroup, sizeof cgroup, "%s/tailnode-test-%d", at[i], (int)getpid());
		if (mkdir(cgroup, 0700) == 0) {
			char path[300];
			snprintf(path, sizeof path, "%s/pids.max", cgroup);
			if (access(path, W_OK) == 0)
				return 1;
			rmdir(cgroup);
		}
	}
	return 0;
}

static void at_the_start(int (*limit)(pid_t)) {
	tailnode_options o = options("climit");
	tailnode_node n;
	tailnode_op op;
	CHECK(limit(getpid()) == 0);
	WANT(tailnode_new(&o, &n, &err), TAILNODE_EXHAUSTED);
	CHECK(err.sys_errno == EAGAIN && err.message[0]);
	WANT(tailnode_new_start(&o, &n, &op, &err), TAILNODE_EXHAUSTED);
}

static void under_way(int (*limit)(pid_t)) {
	int err_fd = dup(2), null = open("/dev/null", O_WRONLY);
	if (isolated()) // the helper's last words are long
		dup2(null, 2);
	tailnode_node n = up("climit");
	dup2(err_fd, 2);
	tailnode_stats st = {.size = sizeof st};
	OK(tailnode_runtime_stats(n, &st, &err));
	if (limit(isolated() ? (pid_t)st.pid : getpid()))
		return; // a helper of another user's
	for (int i = 0; i < 100; i++) {
		int fd, code = tailnode_dial(n, "tcp", "gopeer:7", 0, 30000, &fd, NULL, NULL, &err);
		if (isolated() && code == TAILNODE_CORE_LOST)
			return;
		if (code)
			FAIL("dial: %s", err.message);
		char b[4];
		ssize_t k = send(fd, "ping", 4, MSG_NOSIGNAL);
		if (k == 4)
			k = read(fd, b, 4);
		CHECK(k == 4 || (isolated() && k < 0 && (errno == ECONNRESET || errno == EPIPE)));
		close(fd);
	}
	tailnode_close(n, &err);
}

// Runs it in a process of its own. abort: the runtime may have ended it, with a message.
static void run(const char *what, void (*f)(int (*)(pid_t)), int (*limit)(pid_t), int may_abort) {
	pid_t pid = fork(); // before any node is made
	CHECK(pid >= 0);
	if (pid == 0) {
		alarm(120); // a hang is SIGALRM
		f(limit);
		_exit(0);
	}
	int st;
	CHECK(waitpid(pid, &st, 0) == pid);
	if (WIFEXITED(st) && WEXITSTATUS(st) == 0)
		printf("limits: %s: no harm\n", what);
	else if (may_abort && WIFSIGNALED(st) && WTERMSIG(st) == SIGABRT)
		printf("limits: %s: the runtime ended the process (SIGABRT)\n", what);
	else
		FAIL("%s: status %x", what, (unsigned)st);
}

static void ignore_url(void *user, const char *url) { (void)user, (void)url; }

static int hold[4096], held;

static void more(void) {
	while (held)
		close(hold[--held]);
}

// No more descriptors for the core: in process all but the two that the client itself wants, else none for the helper.
static void no_more(pid_t helper, const struct rlimit *was, int leave) {
	int fd = 3;
	if (!helper) {
		while ((fd = fcntl(0, F_DUPFD_CLOEXEC, 0)) >= 0)
			hold[held++] = fd;
		while (leave-- && held)
			close(hold[--held]);
		return;
	}
	for (char path[64];; fd++) { // numbers below the limit are all taken
		snprintf(path, sizeof path, "/proc/%d/fd/%d", (int)helper, fd);
		if (faccessat(AT_FDCWD, path, F_OK, AT_SYMLINK_NOFOLLOW))
			break;
	}
	struct rlimit l = {(rlim_t)fd, was->rlim_max};
	CHECK(prlimit(helper, RLIMIT_NOFILE, &l, NULL) == 0);
}

// A host that has no descriptor left for the one in a result.
static void results(tailnode_node n) {
	tailnode_op op;
	tailnode_result r = {.size = sizeof r, .fd = -1};
	struct rlimit was, none;
	CHECK(getrlimit(RLIMIT_NOFILE, &was) == 0);
	none = was;
	none.rlim_cur = 3;
	for (int kind = 0; kind < 4; kind++) {
		if (kind == 0)
			OK(tailnode_listen_start(n, "tcp", ":80", 0, &op, &err));
		else if (kind == 1)
			OK(tailnode_listen_packet_start(n, "udp", ":80", 0, &op, &err));
		else if (kind == 2)
			OK(tailnode_dial_start(n, "tcp", "gopeer:7", 0, 30000, &op, &err));
		else
			OK(tailnode_watch_start(n, 0, &op, &err));
		wait_in(tailnode_op_fd(op), 30000);
		CHECK(setrlimit(RLIMIT_NOFILE, &none) == 0);
		int code = tailnode_op_take(op, &r, &err);
		CHECK(setrlimit(RLIMIT_NOFILE, &was) == 0);
		WANT(code, TAILNODE_EXHAUSTED);
		CHECK(err.sys_errno == EMFILE && r.fd == -1);
	}
}

// A core that has no descriptor left for a request says so, and closes what it is told to close.
static void descriptors(void) {
	tailnode_options o = options("cfiles");
	tailnode_node other, n;
	tailnode_stats st = {.size = sizeof st};
	struct rlimit was = {0, 0};
	int refused = 0, code;
	OK(tailnode_new(&o, &other, &err));
	n = up("cfiles2");
	OK(tailnode_runtime_stats(n, &st, &err));
	pid_t helper = isolated() ? (pid_t)st.pid : 0;
	if (helper)
		CHECK(prlimit(helper, RLIMIT_NOFILE, NULL, &was) == 0);
	results(n);
	for (int i = 0; i < 100; i++) { // the core's own descriptors may come and go: some calls find room
		no_more(helper, &was, 2);
		code = tailnode_addresses(n, NULL, NULL, &err);
		more();
		if (code) {
			WANT(code, TAILNODE_EXHAUSTED);
			CHECK(err.sys_errno == EMFILE);
			refused++;
		}
	}
	CHECK(refused);
	if (helper)
		CHECK(prlimit(helper, RLIMIT_NOFILE, &was, NULL) == 0);
	OK(tailnode_addresses(n, NULL, NULL, &err));
	do {
		no_more(helper, &was, 2);
		code = tailnode_close(n, &err);
		more();
	} while (code == TAILNODE_EXHAUSTED && !helper); // the client's pair: nothing was closed
	OK(code);
	OK(tailnode_runtime_stats(other, &st, &err));
	CHECK(st.nodes == 1);

	// A node for whose callbacks there is no room is not made.
	if (!helper) {
		o.auth_url = ignore_url;
		tailnode_node m;
		int told = 0;
		for (int i = 0; i < 50; i++) {
			no_more(0, NULL, 3);
			code = tailnode_new(&o, &m, &err);
			more();
			if (code) {
				WANT(code, TAILNODE_EXHAUSTED);
				told++;
			} else {
				OK(tailnode_close(m, &err));
			}
		}
		CHECK(told);
		OK(tailnode_runtime_stats(other, &st, &err));
		CHECK(st.nodes == 1);
	}
	OK(tailnode_close(other, &err));
	printf("limits: %d of 100 calls without a descriptor for the core refused\n", refused);
}

static void maps(void) {
	tailnode_node n = up("cmaps");
	// Does this kernel name mappings?
	void *p = NULL;
	CHECK(posix_memalign(&p, 4096, 8192) == 0);
	int named = prctl(0x53564d41, 0, p, 4096, "test") == 0; // PR_SET_VMA, PR_SET_VMA_ANON_NAME
	FILE *f = fopen("/proc/self/maps", "r");
	char line[600];
	int go = 0, core = 0;
	while (f && fgets(line, sizeof line, f)) {
		go += strstr(line, "[anon: Go: ") != NULL;
		core += strstr(line, "libtailnode-core") != NULL;
	}
	fclose(f);
	printf("limits: %d mappings named Go%s, %d of the core's file\n", go, named ? "" : " (this kernel has no names)", core);
	if (isolated())
		CHECK(!go && !core);
	else
		CHECK(core && (go || !named));
	OK(tailnode_close(n, &err));
	free(p);
}

int main(void) {
	alarm(200);
	struct rlimit files, now;
	CHECK(getrlimit(RLIMIT_NOFILE, &files) == 0);
	files.rlim_cur = files.rlim_max < 700 ? files.rlim_max : 700; // a host that uses select(2), say
	CHECK(setrlimit(RLIMIT_NOFILE, &files) == 0);
	run("RLIMIT_NPROC before the start", at_the_start, by_rlimit, 0);
	run("RLIMIT_NPROC during traffic", under_way, by_rlimit, !isolated());
	if (make_cgroup()) {
		run("pids.max before the start", at_the_start, by_cgroup, 0);
		run("pids.max during traffic", under_way, by_cgroup, !isolated());
		for (int i = 0; rmdir(cgroup) && i < 1000; i++) // a helper may still be ending
			poll(NULL, 0, 5);
	} else {
		printf("limits: no cgroup can be made here\n");
	}
	maps();
	descriptors();
	CHECK(getrlimit(RLIMIT_NOFILE, &now) == 0);
	if (now.rlim_cur != files.rlim_cur || now.rlim_max != files.rlim_max)
		FAIL("RLIMIT_NOFILE became %llu, %llu", (unsigned long long)now.rlim_cur, (unsigned long long)now.rlim_max);
	printf("limits: ok\n");
	return 0;
}
