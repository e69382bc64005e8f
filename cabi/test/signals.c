// signals.c - what becomes of the host's signals: dispositions before and after, the host's own handlers, fork, fork and exec, descriptors.
#include <dirent.h>
#include <setjmp.h>
#include <stdbool.h>
#include <sys/signalfd.h>
#include <sys/time.h>

#include "check.h"

static struct sigaction before[65], now_[65];
static char alt[1 << 16];

static void snapshot(struct sigaction *s) {
	memset(s, 0, 65 * sizeof *s);
	for (int i = 1; i <= 64; i++)
		sigaction(i, NULL, &s[i]);
}

static void compare(const char *when) {
	snapshot(now_);
	for (int i = 1; i <= 64; i++) {
		if (before[i].sa_handler != now_[i].sa_handler || ((before[i].sa_flags ^ now_[i].sa_flags) & ~0x04000000)) // SA_RESTORER: libc's own, and without meaning for SIG_DFL
			FAIL("%s: the disposition of signal %d changed", when, i);
	}
	sigset_t set;
	CHECK(pthread_sigmask(SIG_BLOCK, NULL, &set) == 0);
	for (int i = 1; i <= 64; i++)
		CHECK(sigismember(&set, i) <= 0);
	stack_t ss;
	CHECK(sigaltstack(NULL, &ss) == 0 && ss.ss_sp == alt);
	// No other thread takes a signal of the host's. What a fault raises is not to be blocked; 32 and 33 are libc's own.
	DIR *d = opendir("/proc/self/task");
	struct dirent *e;
	while (d && (e = readdir(d))) {
		char path[300], line[200];
		unsigned long long blocked = 0;
		if (e->d_name[0] == '.' || atoi(e->d_name) == getpid())
			continue;
		snprintf(path, sizeof path, "/proc/self/task/%s/status", e->d_name);
		FILE *f = fopen(path, "r");
		while (f && fgets(line, sizeof line, f))
			sscanf(line, "SigBlk: %llx", &blocked);
		if (!f)
			continue;
		fclose(f);
		static const int open[] = {SIGILL, SIGTRAP, SIGBUS, SIGFPE, SIGSEGV, SIGKILL, SIGSTOP, 32, 33};
		for (int sig = 1; sig <= 64; sig++) {
			bool may = false;
			for (size_t i = 0; i < sizeof open / sizeof *open; i++)
				may |= open[i] == sig;
			if (!may && !(blocked >> (sig - 1) & 1))
				FAIL("%s: thread %s takes signal %d (mask %llx)", when, e->d_name, sig, blocked);
		}
	}
	closedir(d);
}

static volatile sig_atomic_t got[65], on_alt[65];
static sigjmp_buf fault;

static void handler(int sig, siginfo_t *si, void *ctx) {
	(void)ctx;
	(void)si;
	char here;
	got[sig]++;
	on_alt[sig] = &here >= alt && &here < alt + sizeof alt;
	if (sig == SIGSEGV || sig == SIGBUS || sig == SIGFPE)
		siglongjmp(fault, 1);
}

static void install(int sig) {
	struct sigaction sa;
	memset(&sa, 0, sizeof sa);
	sa.sa_sigaction = handler;
	sa.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
	CHECK(sigaction(sig, &sa, NULL) == 0);
}

static const int mine[] = {SIGSEGV, SIGBUS, SIGFPE, SIGPROF, SIGPIPE, SIGINT, SIGTERM, SIGCHLD, SIGUSR1, SIGALRM};

static void raise_all(void) {
	memset((void *)got, 0, sizeof got);
	for (size_t i = 0; i < sizeof mine / sizeof *mine; i++) {
		int sig = mine[i];
		if (sig == SIGSEGV || sig == SIGBUS || sig == SIGFPE) { // a real fault, on this thread
			if (!sigsetjmp(fault, 1)) {
				if (sig == SIGSEGV)
					*(volatile int *)(uintptr_t)8 = 1;
				else
					raise(sig);
			}
		} else {
			raise(sig);
		}
		if (got[sig] != 1 || !on_alt[sig])
			FAIL("signal %d: the host's handler ran %d times, %s", sig, (int)got[sig], on_alt[sig] ? "on its stack" : "not on its stack");
	}
}

static int open_fds(void) {
	int n = 0;
	DIR *d = opendir("/proc/self/fd");
	while (d && readdir(d))
		n++;
	closedir(d);
	return n;
}

static void traffic(tailnode_node n) {
	int fd;
	OK(tailnode_dial(n, "tcp", "gopeer:7", 0, 30000, &fd, NULL, NULL, &err));
	char b[4];
	for (int i = 0; i < 100; i++) {
		write_all(fd, "ping", 4);
		read_all(fd, b, 4);
	}
	close(fd);
}

static void forks(tailnode_node n) {
	int fd;
	OK(tailnode_dial(n, "tcp", "gopeer:7", 0, 30000, &fd, NULL, NULL, &err));
	tailnode_op op;
	OK(tailnode_status_start(n, 1, &op, &err));
	pid_t pid = fork();
	CHECK(pid >= 0);
	if (pid == 0) { // every call says so, at once
		alarm(60);
		char *json;
		tailnode_options o = options("child");
		tailnode_node m;
		tailnode_stats st = {.size = sizeof st};
		WANT(tailnode_status(n, 1, &json, NULL, &err), TAILNODE_FORKED);
		WANT(tailnode_up(n, TAILNODE_FOREVER, &err), TAILNODE_FORKED);
		WANT(tailnode_new(&o, &m, &err), TAILNODE_FORKED);
		WANT(tailnode_runtime_stats(n, &st, &err), TAILNODE_FORKED);
		WANT(tailnode_op_take(op, NULL, &err), TAILNODE_FORKED);
		WANT(tailnode_op_cancel(op), TAILNODE_FORKED);
		WANT(tailnode_accept(fd, 0, &fd, NULL, NULL, &err), TAILNODE_FORKED);
		CHECK(tailnode_op_fd(op) == -1);
		WANT(tailnode_close(n, &err), TAILNODE_FORKED);
		_exit(0);
	}
	int st;
	CHECK(waitpid(pid, &st, 0) == pid && WIFEXITED(st) && WEXITSTATUS(st) == 0);
	tailnode_result r = {.size = sizeof r};
	OK(tailnode_op_wait(op, 30000, &r, &err));
	tailnode_free(r.data);
	// fork and exec, in the middle of a transfer: nothing is inherited.
	write_all(fd, "half", 4);
	pid = fork();
	CHECK(pid >= 0);
	if (pid == 0) {
		// Not this program again: with the core linked in, its Go runtime has descriptors of its own.
		execl("/bin/sh", "sh", "-c", "n=-3; for f in /proc/$$/fd/*; do [ -L $f ] && n=$((n+1)); done; exit $n", (char *)NULL);
		_exit(99);
	}
	CHECK(waitpid(pid, &st, 0) == pid && WIFEXITED(st));
	if (WEXITSTATUS(st))
		FAIL("a program that was started inherited %d descriptors", WEXITSTATUS(st));
	char b[4];
	read_all(fd, b, 4);
	close(fd);
	// The helper is no child of this process.
	CHECK(waitpid(-1, &st, WNOHANG) == -1 && errno == ECHILD);
}

// A profiler that uses SIGPROF, and that has not thought of SA_ONSTACK and needs more stack than a goroutine has: its handler
// runs on the host's threads only.
static volatile sig_atomic_t samples, strange;
static pthread_t host_thread;

static void sample(int sig) {
	volatile char room[32 << 10];
	for (size_t i = 0; i < sizeof room; i += 64)
		room[i] = (char)sig;
	samples++;
	strange += !pthread_equal(pthread_self(), host_thread) + !room[64];
}

static void profiler(tailnode_node n) {
	struct sigaction sa, old;
	memset(&sa, 0, sizeof sa);
	sa.sa_handler = sample;
	sa.sa_flags = SA_RESTART;
	host_thread = pthread_self();
	CHECK(sigaction(SIGPROF, &sa, &old) == 0);
	struct itimerval it = {{0, 1000}, {0, 1000}};
	CHECK(setitimer(ITIMER_PROF, &it, NULL) == 0);
	while (samples < (isolated() ? 5 : 50)) // there, the host itself uses little processor time
		traffic(n);
	memset(&it, 0, sizeof it);
	setitimer(ITIMER_PROF, &it, NULL);
	CHECK(!strange && sigaction(SIGPROF, &old, NULL) == 0);
}

// A host that blocks SIGCHLD and waits for it with signalfd gets every one.
static void children(tailnode_node n) {
	sigset_t set, old;
	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	CHECK(pthread_sigmask(SIG_BLOCK, &set, &old) == 0);
	struct sigaction sa, handler_;
	memset(&sa, 0, sizeof sa);
	sa.sa_handler = SIG_DFL;
	CHECK(sigaction(SIGCHLD, &sa, &handler_) == 0);
	int fd = signalfd(-1, &set, SFD_CLOEXEC);
	CHECK(fd >= 0);
	for (int i = 0; i < 20; i++) {
		pid_t pid = fork();
		if (pid == 0)
			_exit(i);
		traffic(n);
		struct signalfd_siginfo si;
		CHECK(read(fd, &si, sizeof si) == sizeof si && (pid_t)si.ssi_pid == pid);
		CHECK(waitpid(pid, NULL, 0) == pid);
	}
	close(fd);
	CHECK(sigaction(SIGCHLD, &handler_, NULL) == 0 && pthread_sigmask(SIG_SETMASK, &old, NULL) == 0);
}

// A constructor of the host's has its own signal mask, and what it blocks stays so, also where a runtime that is linked in starts between it and main. It
// comes before that, as what the test driver left open is to be closed, and not what the runtime has opened.
static sigset_t first;

__attribute__((constructor)) static void construct(void) {
	for (int fd = 3; fd < 1024; fd++)
		close(fd);
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGWINCH);
	pthread_sigmask(SIG_BLOCK, &set, &first);
}

int main(int argc, char **argv) {
	for (int i = 1; i <= 64; i++)
		CHECK(sigismember(&first, i) <= 0);
	sigset_t mask;
	CHECK(pthread_sigmask(SIG_SETMASK, &first, &mask) == 0);
	for (int i = 1; i <= 64; i++)
		CHECK(sigismember(&mask, i) == (i == SIGWINCH) || sigismember(&mask, i) < 0);
	stack_t ss;
	memset(&ss, 0, sizeof ss);
	ss.ss_sp = alt;
	ss.ss_size = sizeof alt;
	CHECK(sigaltstack(&ss, NULL) == 0);

	snapshot(before);
	for (int i = 1; i <= 64; i++) // with the core linked in, its runtime has started
		if (before[i].sa_handler != SIG_DFL && before[i].sa_handler != SIG_IGN)
			FAIL("signal %d has a handler before anything was called", i);
	tailnode_options o = options("csignals");
	tailnode_node n;
	if (argc > 1 && !strcmp(argv[1], "--handlers-first")) {
		for (size_t i = 0; i < sizeof mine / sizeof *mine; i++)
			install(mine[i]);
		OK(tailnode_new(&o, &n, &err));
		OK(tailnode_up(n, 30000, &err));
		raise_all();
		traffic(n);
		raise_all();
		OK(tailnode_close(n, &err));
		raise_all();
		printf("signals --handlers-first: ok\n");
		return 0;
	}
	int fds = open_fds();
	OK(tailnode_new(&o, &n, &err));
	compare("after load");
	OK(tailnode_up(n, 30000, &err));
	compare("after start");
	traffic(n);
	compare("after traffic");
	forks(n);
	OK(tailnode_close(n, &err));
	compare("after close");
	// Handlers that the host installs later get their signals, also while the node works.
	for (size_t i = 0; i < sizeof mine / sizeof *mine; i++)
		install(mine[i]);
	n = up("csignals2");
	raise_all();
	traffic(n);
	raise_all();
	profiler(n);
	children(n);
	OK(tailnode_close(n, &err));
	for (int i = 0; isolated() && open_fds() != fds; i++) {
		CHECK(i < 30000);
		poll(NULL, 0, 1);
	}
	printf("signals: ok\n");
	return 0;
}
