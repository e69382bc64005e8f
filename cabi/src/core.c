// core.c - where the node runs: a core in this process, or in a helper. Either way, a socket to it.
#include "internal.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>

#ifndef TAILNODE_LIBEXECDIR
#define TAILNODE_LIBEXECDIR "/usr/local/libexec/tailnode"
#endif

// Present when the core is linked in statically and something pulled it in.
extern int tailnode_core_serve(int fd) __attribute__((weak));

static pthread_mutex_t cores_mu = PTHREAD_MUTEX_INITIALIZER;
static int (*given_serve)(int);
static struct core *in_process; // lives until the process ends, as the Go runtime does

// Descriptors of cores, for the child of a fork to close: a helper sees its host's end by end of file.
#define MAX_CORES 1024
static volatile int core_fds[MAX_CORES]; // fd + 1, or 0

// Held while a descriptor of a core exists that is not noted, and over a fork.
static pthread_mutex_t unnoted = PTHREAD_MUTEX_INITIALIZER;

void tn_core_before_fork(void) { pthread_mutex_lock(&unnoted); }
void tn_core_after_fork(void) { pthread_mutex_unlock(&unnoted); }

void tn_core_in_child(void) {
	for (int i = 0; i < MAX_CORES; i++)
		if (core_fds[i])
			close(core_fds[i] - 1);
}

bool tn_core_linked(void) { return tailnode_core_serve != NULL; }

static void note_fd(int fd) {
	for (int i = 0; i < MAX_CORES; i++) {
		int zero = 0;
		if (__atomic_compare_exchange_n(&core_fds[i], &zero, fd + 1, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
			return;
	}
}

static void forget_fd(int fd) {
	for (int i = 0; i < MAX_CORES; i++) {
		int want = fd + 1;
		if (__atomic_compare_exchange_n(&core_fds[i], &want, 0, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
			return;
	}
}

int64_t tn_now_ms(void) {
	struct timespec ts;
	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

static struct core *new_core(int fd, pid_t pid) {
	struct core *c = calloc(1, sizeof *c);
	if (!c)
		return NULL;
	c->refs = 1;
	c->fd = fd;
	c->pid = pid;
	note_fd(fd);
	return c;
}

// Where the host is a subreaper, or its container's first process, a helper becomes its child after all: it is waited for when it has ended. That is seen with the
// next helper that starts or is let go of, for nothing here waits; unless the host's own wait was first.
static pthread_mutex_t ended_mu = PTHREAD_MUTEX_INITIALIZER;
static pid_t ended[64]; // helpers that were let go of, and were not dead yet

static void reap(pid_t also) {
	pthread_mutex_lock(&ended_mu);
	for (size_t i = 0; i < sizeof ended / sizeof *ended; i++) {
		if (ended[i] && waitpid(ended[i], NULL, WNOHANG) != 0)
			ended[i] = 0;
		if (!ended[i] && also > 0) {
			if (waitpid(also, NULL, WNOHANG) == 0) // else it is dead, or not a child: the usual case
				ended[i] = also;
			also = 0;
		}
	}
	pthread_mutex_unlock(&ended_mu);
}

void tn_core_unref(struct core *c) {
	if (!c || __atomic_sub_fetch(&c->refs, 1, __ATOMIC_ACQ_REL) != 0)
		return;
	pthread_mutex_lock(&unnoted); // a child that is made in between would keep the helper
	forget_fd(c->fd);
	close(c->fd);
	pthread_mutex_unlock(&unnoted);
	if (c->pid)
		reap(c->pid);
	free(c);
}

// The directory of this library or, linked in statically, of the program.
static bool beside(char *out, size_t size, const char *name) {
	Dl_info info;
	char real[PATH_MAX];
	if (!dladdr((void *)(uintptr_t)&beside, &info) || !info.dli_fname || !realpath(info.dli_fname, real))
		return false;
	char *slash = strrchr(real, '/');
	if (!slash)
		return false;
	*slash = 0;
	return snprintf(out, size, "%s/%s", real, name) < (int)size;
}

int tailnode_use_core(int (*serve)(int)) {
	CHECK_FORK(NULL);
	if (!serve)
		return TAILNODE_INVALID_ARGUMENT;
	pthread_mutex_lock(&cores_mu);
	int code = in_process ? TAILNODE_INVALID_STATE : TAILNODE_OK;
	if (!code)
		given_serve = serve;
	pthread_mutex_unlock(&cores_mu);
	return code;
}

static int find_serve(int (**out)(int), tailnode_error *err) {
	if (given_serve) {
		*out = given_serve;
		return 0;
	}
	if (tailnode_core_serve) {
		*out = tailnode_core_serve;
		return 0;
	}
	void *lib = NULL;
	const char *name = secure_getenv("TAILNODE_CORE");
	char path[PATH_MAX];
	const char *why = NULL;
	if (name && *name) {
		lib = dlopen(name, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
		why = lib ? NULL : dlerror();
	} else {
		if (beside(path, sizeof path, "libtailnode-core.so.0") && access(path, R_OK) == 0) {
			lib = dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
			why = lib ? NULL : dlerror();
		}
		if (!lib && !why) {
			lib = dlopen("libtailnode-core.so.0", RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
			why = lib ? NULL : dlerror();
		}
	}
	if (!lib)
		return tn_fail(err, TAILNODE_UNSUPPORTED, 0, "tailnode: the core cannot be loaded: %s", why ? why : "unknown reason");
	void *sym = dlsym(lib, "tailnode_core_serve");
	if (!sym)
		return tn_fail(err, TAILNODE_UNSUPPORTED, 0, "tailnode: the core cannot be loaded: it has no tailnode_core_serve");
	memcpy(out, &sym, sizeof sym);
	return 0;
}

// The one call into Go is made on a thread that exists only for it: the runtime gives each thread that enters it a signal stack and a signal mask, which
// are not for a thread of the host's.
struct entry {
	int (*serve)(int);
	int fd, result;
};

static void *enter(void *p) {
	struct entry *e = p;
	e->result = e->serve(e->fd);
	return NULL;
}

static int enter_go(int (*serve)(int), int fd) { // fd is taken over on success only
	struct entry e = {serve, fd, 0};
	pthread_t t;
	sigset_t all, old;
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &old);
	int err = pthread_create(&t, NULL, enter, &e);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (err)
		return err;
	pthread_join(t, NULL);
	return e.result;
}

static void *wait_for(void *gate) {
	pthread_mutex_lock(gate);
	pthread_mutex_unlock(gate);
	return NULL;
}

// A Go runtime that cannot start a thread ends the process. So it is tried before, with as many as it starts with and some more.
static int threads_left(void) {
	enum { SOME = 12 };
	pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
	pthread_t t[SOME];
	int n = 0, e = 0;
	sigset_t all, old;
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &old);
	pthread_mutex_lock(&gate); // they stay until all are there
	while (n < SOME && !(e = pthread_create(&t[n], NULL, wait_for, &gate)))
		n++;
	pthread_mutex_unlock(&gate);
	for (int i = 0; i < n; i++)
		pthread_join(t[i], NULL);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	return e;
}

int tn_core_in_process(struct core **out, tailnode_error *err) {
	pthread_mutex_lock(&cores_mu);
	int code = 0;
	if (!in_process) {
		int (*serve)(int) = NULL;
		int pair[2], left = threads_left();
		code = left ? tn_fail(err, TAILNODE_EXHAUSTED, left, "tailnode: the core cannot have its threads: %s", strerror(left)) : find_serve(&serve, err);
		if (!code && socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
			code = tn_fail(err, TAILNODE_EXHAUSTED, errno, "tailnode: socketpair: %s", strerror(errno));
		else if (!code) {
			int e = enter_go(serve, pair[1]);
			struct core *c = e ? NULL : new_core(pair[0], 0);
			if (!c) {
				close(pair[0]);
				if (e)
					close(pair[1]);
				code = tn_fail(err, TAILNODE_EXHAUSTED, e ? e : ENOMEM, "tailnode: the core did not start: %s", strerror(e ? e : ENOMEM));
			}
			in_process = c;
		}
	}
	if (!code) {
		__atomic_add_fetch(&in_process->refs, 1, __ATOMIC_RELAXED);
		*out = in_process;
	}
	pthread_mutex_unlock(&cores_mu);
	return code;
}

// ---- the helper ----
// It must not be the host's child: the host's wait() and SIGCHLD are its own. So a short-lived process in between, made by
// clone(2) with no exit signal (so that only wait with __WCLONE sees it) and sharing memory as vfork does, spawns the helper and ends; the
// helper is init's, or the subreaper's, from then on.

struct launch {
	const char *path;
	int fd;
	int error;
	pid_t pid;
};

extern char **environ;

static int launch(void *p) {
	struct launch *l = p;
	char *argv[] = {(char *)"tailnode-helper", (char *)"3", NULL};
	posix_spawn_file_actions_t fa;
	posix_spawnattr_t at;
	sigset_t none, all;
	l->error = posix_spawn_file_actions_init(&fa);
	if (l->error)
		return 0;
	l->error = posix_spawnattr_init(&at);
	if (l->error)
		goto out;
	// dup2 onto itself would leave close-on-exec set; glibc's file action clears it then.
	l->error = posix_spawn_file_actions_adddup2(&fa, l->fd, 3);
#if defined(__GLIBC__) && (__GLIBC__ > 2 || __GLIBC_MINOR__ >= 34)
	if (!l->error)
		l->error = posix_spawn_file_actions_addclosefrom_np(&fa, 4); // what the host forgot to mark close-on-exec
#endif
	if (!l->error)
		l->error = posix_spawn_file_actions_addopen(&fa, 0, "/dev/null", O_RDONLY, 0);
	if (!l->error)
		l->error = posix_spawn_file_actions_addopen(&fa, 1, "/dev/null", O_WRONLY, 0);
	sigemptyset(&none);
	sigfillset(&all);
	sigdelset(&all, SIGKILL);
	sigdelset(&all, SIGSTOP);
	posix_spawnattr_setsigmask(&at, &none);
	posix_spawnattr_setsigdefault(&at, &all);
	posix_spawnattr_setpgroup(&at, 0); // a Ctrl-C in the terminal is for the host to handle
	posix_spawnattr_setflags(&at, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETPGROUP);
	if (!l->error)
		l->error = posix_spawn(&l->pid, l->path, &fa, &at, argv, environ);
	posix_spawnattr_destroy(&at);
out:
	posix_spawn_file_actions_destroy(&fa);
	return 0;
}

static int spawn_helper(const char *path, int fd, pid_t *pid) {
	const size_t size = 256 << 10;
	char *stack = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
	if (stack == MAP_FAILED)
		return errno;
	// Shared memory proper, for where clone is carried out as a fork (valgrind).
	struct launch *l = mmap(NULL, sizeof *l, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (l == MAP_FAILED) {
		int e = errno;
		munmap(stack, size);
		return e;
	}
	*l = (struct launch){.path = path, .fd = fd, .error = ECHILD};
	sigset_t all, old;
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &old); // no handler of the host may run on the shared memory
	pid_t child = clone(launch, stack + size, CLONE_VM | CLONE_VFORK, l);
	int e = child < 0 ? errno : 0;
	if (child > 0)
		while (waitpid(child, NULL, __WCLONE) < 0 && errno == EINTR)
			;
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	munmap(stack, size);
	if (!e)
		e = l->error;
	*pid = l->pid;
	munmap(l, sizeof *l);
	return e;
}

const char *tn_helper_path(char buf[PATH_MAX], const char *path) {
	if (!path || !*path)
		path = secure_getenv("TAILNODE_HELPER");
	if (!path || !*path)
		path = (beside(buf, PATH_MAX, "tailnode-helper") && access(buf, X_OK) == 0) ||
		               (beside(buf, PATH_MAX, "../libexec/tailnode/tailnode-helper") && access(buf, X_OK) == 0)
		           ? buf
		           : TAILNODE_LIBEXECDIR "/tailnode-helper";
	return path;
}

int tn_core_spawn(const char *path, struct core **out, tailnode_error *err) {
	int pair[2];
	reap(0);
	pthread_mutex_lock(&unnoted);
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0) {
		int e = errno;
		pthread_mutex_unlock(&unnoted);
		return tn_fail(err, TAILNODE_EXHAUSTED, e, "tailnode: socketpair: %s", strerror(e));
	}
	pid_t pid = 0;
	int e = spawn_helper(path, pair[1], &pid);
	close(pair[1]);
	struct core *c = e ? NULL : new_core(pair[0], pid);
	if (!c)
		close(pair[0]);
	pthread_mutex_unlock(&unnoted);
	if (!c) {
		return tn_fail(err, e == ENOENT || e == EACCES || e == ENOEXEC ? TAILNODE_UNSUPPORTED : TAILNODE_EXHAUSTED, e ? e : ENOMEM,
		               "tailnode: the helper %s cannot be started: %s", path, strerror(e ? e : ENOMEM));
	}
	*out = c;
	return 0;
}

// ---- messages ----

int tn_core_send(struct core *c, const void *msg, size_t len, const int *fds, int nfds, bool wait) {
	struct iovec iov = {(void *)(uintptr_t)msg, len};
	union {
		char buf[CMSG_SPACE(2 * sizeof(int))];
		struct cmsghdr align;
	} u;
	struct msghdr mh = {.msg_iov = &iov, .msg_iovlen = 1};
	if (nfds) {
		memset(&u, 0, sizeof u);
		mh.msg_control = u.buf;
		mh.msg_controllen = CMSG_SPACE((size_t)nfds * sizeof(int));
		struct cmsghdr *cm = CMSG_FIRSTHDR(&mh);
		cm->cmsg_level = SOL_SOCKET;
		cm->cmsg_type = SCM_RIGHTS;
		cm->cmsg_len = CMSG_LEN((size_t)nfds * sizeof(int));
		memcpy(CMSG_DATA(cm), fds, (size_t)nfds * sizeof(int));
	}
	for (;;) { // a message goes whole or not at all, whoever else sends
		if (sendmsg(c->fd, &mh, MSG_NOSIGNAL | MSG_DONTWAIT) >= 0)
			return 0;
		if (errno == EINTR)
			continue;
		if (errno != EAGAIN || !wait)
			return errno;
		struct pollfd p = {.fd = c->fd, .events = POLLOUT};
		if (poll(&p, 1, -1) < 0 && errno != EINTR)
			return errno;
		if (tn_forked)
			return EPIPE;
	}
}

int tn_detached(void *(*run)(void *), void *arg) {
	pthread_t t;
	pthread_attr_t at;
	sigset_t all, old;
	int e = pthread_attr_init(&at);
	if (e)
		return e;
	pthread_attr_setdetachstate(&at, PTHREAD_CREATE_DETACHED);
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &old);
	e = pthread_create(&t, &at, run, arg);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	pthread_attr_destroy(&at);
	return e;
}

ssize_t tn_recv_fd(int fd, void *buf, size_t len, int flags, int *passed) {
	struct iovec iov = {buf, len};
	union {
		char buf[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} u;
	struct msghdr mh = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = u.buf, .msg_controllen = sizeof u.buf};
	ssize_t n;
	do
		n = recvmsg(fd, &mh, flags | MSG_CMSG_CLOEXEC);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		return n;
	for (struct cmsghdr *cm = CMSG_FIRSTHDR(&mh); cm; cm = CMSG_NXTHDR(&mh, cm)) {
		if (cm->cmsg_level != SOL_SOCKET || cm->cmsg_type != SCM_RIGHTS || cm->cmsg_len < CMSG_LEN(sizeof(int)))
			continue;
		int got;
		memcpy(&got, CMSG_DATA(cm), sizeof got);
		if (*passed >= 0)
			close(*passed);
		*passed = got;
	}
	return n;
}
