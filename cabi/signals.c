// signals.c - keeps the Go runtime out of the host's signals.
//
// The runtime starts on a thread of its own while the library is loaded, and all its threads inherit that one's signal mask. So every signal is
// blocked around its start: no signal of the host is ever handled on a thread of Go's, and a handler of the host's needs no SA_ONSTACK. (The
// runtime unblocks what a fault of its own would raise. SIGURG, with which it preempts goroutines, stays blocked: it
// preempts where functions are called, as before Go 1.14.) When it has started, the handlers that it installed are taken out again.
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <string.h>

#define SIGNALS 65

static sigset_t host_mask;
static struct sigaction host[SIGNALS];

// Before the runtime's constructor, which has no priority.
__attribute__((constructor(101))) static void before_runtime(void) {
	for (int i = 1; i < SIGNALS; i++)
		sigaction(i, NULL, &host[i]);
	sigset_t all;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &host_mask);
}

// After it: this file is linked behind the runtime. A test looks at the masks of the threads.
__attribute__((constructor)) static void after_runtime(void) { pthread_sigmask(SIG_SETMASK, &host_mask, NULL); }

static bool same(const struct sigaction *a, const struct sigaction *b) { return a->sa_sigaction == b->sa_sigaction; }

// Called when the runtime has started. Where the host has installed a handler since, it stays.
void tailnode_core_give_back_signals(void) {
	static const int taken[] = {SIGSEGV, SIGBUS, SIGFPE, SIGPIPE, SIGURG};
	enum { N = sizeof taken / sizeof *taken };
	struct sigaction now[N], sa;
	for (int i = 0; i < N; i++)
		sigaction(taken[i], NULL, &now[i]);
	for (int i = 0; i < N; i++) {
		if (same(&now[i], &host[taken[i]]))
			continue;
		for (int j = 0; j < N; j++) // the runtime has one handler for all of them, a host hardly the same for two of them and SIGURG
			if (j != i && same(&now[i], &now[j]) && !same(&now[j], &host[taken[j]])) {
				sigaction(taken[i], &host[taken[i]], NULL);
				break;
			}
	}
	// It also sets SA_ONSTACK on the handlers that it finds.
	for (int i = 1; i < SIGNALS; i++)
		if (sigaction(i, NULL, &sa) == 0 && same(&sa, &host[i]) && sa.sa_flags != host[i].sa_flags)
			sigaction(i, &host[i], NULL);
}
