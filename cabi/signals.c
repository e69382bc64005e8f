// signals.c - keeps the Go runtime out of the host's signals: it installs no handler, and none of its threads takes a signal of the host's.
//
// The runtime has a table that says what it does about each signal: for which it installs a handler, and which its threads do not block
// (SIGCHLD, SIGPROF and the faults), because a Go program wants them. A host's handler would then run on the stack of a goroutine, which is a few
// kilobytes long, unless the host had thought of SA_ONSTACK, and a signal that the host waits for with signalfd would be lost. So, before the runtime starts,
// the table is found in this library's data and is made to say: nothing. Only faults stay unblocked, because a fault that is blocked ends the process without the
// host's handler. The runtime starts on a thread of its own while the library is loaded, and all its threads inherit that one's mask: every signal is
// blocked around its start.
//
// Where the table is not the one that is known here (another release of Go), it is left as it is, and the handlers that the runtime installs are
// taken out again when it has started. The test looks at every disposition, and at the mask of every thread.
#define _GNU_SOURCE
#include <link.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/resource.h>

#define SIGNALS 65

static sigset_t host_mask;
static struct sigaction host[SIGNALS];
static bool silenced;

// ---- the runtime's table ----

struct entry { // runtime.sigTabT
	int32_t flags;
	const char *name;
	int64_t len;
};

enum { NOTIFY = 1, KILL = 2, THROW = 4, PANIC = 8, DEFAULT = 16, SET_STACK = 64, UNBLOCK = 128, IGN = 256 };

// What tells the table from everything else, and this table from another release's.
static const struct {
	int sig, flags;
	const char *name;
} known[] = {
    {0, 0, "SIGNONE"},
    {SIGHUP, NOTIFY + KILL, "SIGHUP"},
    {SIGILL, THROW + UNBLOCK, "SIGILL"},
    {SIGBUS, PANIC + UNBLOCK, "SIGBUS"},
    {SIGKILL, 0, "SIGKILL"},
    {SIGSEGV, PANIC + UNBLOCK, "SIGSEGV"},
    {SIGCHLD, NOTIFY + UNBLOCK + IGN, "SIGCHLD"},
    {SIGTSTP, NOTIFY + DEFAULT + IGN, "SIGTSTP"},
    {SIGPROF, NOTIFY + UNBLOCK, "SIGPROF"},
    {32, SET_STACK + UNBLOCK, "signal 32"},
    {64, NOTIFY, "signal 64"},
};

static bool is_table(const struct entry *t, uintptr_t low, uintptr_t high) {
	for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
		const struct entry *e = &t[known[i].sig];
		size_t n = strlen(known[i].name);
		uintptr_t at = (uintptr_t)e->name;
		if (e->flags != known[i].flags || e->len < (int64_t)n || e->len > 100 || at < low || at > high - 100 || memcmp(e->name, known[i].name, n) != 0)
			return false;
	}
	return true;
}

static void quiet(struct entry *t) {
	for (int i = 1; i < SIGNALS; i++) {
		switch (i) {
		case 32: // libc's own: to cancel threads,
		case 33: // to change the user of all of them,
#ifndef __GLIBC__
		case 34: // and, for musl, to run something on all of them
#endif
			break;
		case SIGILL:
		case SIGTRAP:
		case SIGBUS:
		case SIGFPE:
		case SIGSEGV:
			t[i].flags = UNBLOCK + DEFAULT; // DEFAULT: the disposition is not the runtime's to touch
			break;
		default:
			t[i].flags = 0;
		}
	}
}

static int in_object(struct dl_phdr_info *info, size_t size, void *found) {
	(void)size;
	uintptr_t low = UINTPTR_MAX, high = 0, here = (uintptr_t)&host_mask;
	bool mine = false;
	for (int i = 0; i < info->dlpi_phnum; i++) {
		const ElfW(Phdr) *p = &info->dlpi_phdr[i];
		uintptr_t from = info->dlpi_addr + p->p_vaddr, to = from + p->p_memsz;
		if (p->p_type != PT_LOAD)
			continue;
		low = from < low ? from : low;
		high = to > high ? to : high;
		mine |= here >= from && here < to;
	}
	if (!mine)
		return 0;
	for (int i = 0; i < info->dlpi_phnum; i++) {
		const ElfW(Phdr) *p = &info->dlpi_phdr[i];
		uintptr_t from = (info->dlpi_addr + p->p_vaddr + 7) & ~(uintptr_t)7, to = info->dlpi_addr + p->p_vaddr + p->p_filesz;
		if (p->p_type != PT_LOAD || !(p->p_flags & PF_W))
			continue;
		for (int k = 0; k < info->dlpi_phnum; k++) { // what is read-only by now stands at the beginning
			const ElfW(Phdr) *r = &info->dlpi_phdr[k];
			uintptr_t end = (info->dlpi_addr + r->p_vaddr + r->p_memsz + 7) & ~(uintptr_t)7;
			if (r->p_type == PT_GNU_RELRO && end > from && info->dlpi_addr + r->p_vaddr <= from)
				from = end;
		}
		for (; from < to && to - from >= SIGNALS * sizeof(struct entry); from += 8) {
			struct entry *t = (struct entry *)from;
			if (t->flags == 0 && t->len > 7 && t->len < 100 && is_table(t, low, high)) {
				*(struct entry **)found = t;
				return 1;
			}
		}
	}
	return 1;
}

// ---- the limit on descriptors ----

static struct rlimit files;

// Package syscall raises it when it is initialised, to one less than what is allowed (by which it can be told), for itself; but it is the host's, and
// its children's: select(2) has no room for more.
void tailnode_core_give_back_limits(void) {
	struct rlimit now;
	if (getrlimit(RLIMIT_NOFILE, &now) == 0 && now.rlim_max == files.rlim_max && now.rlim_cur + 1 == now.rlim_max && files.rlim_cur < now.rlim_cur)
		setrlimit(RLIMIT_NOFILE, &files);
}

// ---- around the start of the runtime ----

// Before the runtime's constructor, which has no priority. (In the archive archive.ld takes this one's away, and puts it directly before.)
__attribute__((constructor(101))) static void before_runtime(void) {
	getrlimit(RLIMIT_NOFILE, &files);
	struct entry *table = NULL;
	dl_iterate_phdr(in_object, &table);
	if (table) {
		quiet(table);
		silenced = true;
	}
	for (int i = 1; i < SIGNALS; i++)
		sigaction(i, NULL, &host[i]);
	sigset_t all;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &host_mask);
}

// Directly after it: this file is linked behind the runtime.
__attribute__((constructor)) static void after_runtime(void) { pthread_sigmask(SIG_SETMASK, &host_mask, NULL); }

static bool same(const struct sigaction *a, const struct sigaction *b) { return a->sa_sigaction == b->sa_sigaction; }

// Called when the runtime has started, for the case that its table was not found. Where the host has installed a handler since, it stays.
void tailnode_core_give_back_signals(void) {
	if (silenced)
		return;
	static const int taken[] = {SIGSEGV, SIGBUS, SIGFPE, SIGPIPE, SIGURG};
	struct sigaction runtime, sa;
	sigaction(SIGURG, NULL, &runtime); // it has one handler for all of them, and SIGURG is what a host hardly has one for
	if (!same(&runtime, &host[SIGURG]))
		for (size_t i = 0; i < sizeof taken / sizeof *taken; i++)
			if (sigaction(taken[i], NULL, &sa) == 0 && same(&sa, &runtime))
				sigaction(taken[i], &host[taken[i]], NULL);
	// It also sets SA_ONSTACK on the handlers that it finds.
	for (int i = 1; i < SIGNALS; i++)
		if (sigaction(i, NULL, &sa) == 0 && same(&sa, &host[i]) && sa.sa_flags != host[i].sa_flags)
			sigaction(i, &host[i], NULL);
}
