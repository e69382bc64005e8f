// check.h - the few things that every test program uses.
#ifndef CHECK_H
#define CHECK_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "tailnode.h"

static tailnode_error err;

#define FAIL(...)                                                                  \
	do {                                                                       \
		fflush(stdout); \
	fprintf(stderr, "%s:%d: ", __FILE__, __LINE__);                    \
		fprintf(stderr, __VA_ARGS__);                                      \
		fprintf(stderr, "\n");                                             \
		_exit(1);                                                          \
	} while (0)
#define CHECK(cond)                                                                \
	do {                                                                       \
		if (!(cond))                                                       \
			FAIL("%s (errno %s)", #cond, strerror(errno));             \
	} while (0)
#define OK(call)                                                                   \
	do {                                                                       \
		int ok_code = (call);                                              \
		if (ok_code)                                                       \
			FAIL("%s: %s: %s", #call, tailnode_code_name(ok_code), err.message); \
	} while (0)
#define WANT(call, code)                                                           \
	do {                                                                       \
		int want_code = (call);                                            \
		if (want_code != (code))                                           \
			FAIL("%s: %s (%s), want %s", #call, tailnode_code_name(want_code), err.message, tailnode_code_name(code)); \
	} while (0)

// Every test runs in the mode that TAILNODE_TEST_MODE names, with a program that hangs killed.
static inline tailnode_options options(const char *hostname) {
	tailnode_options o = TAILNODE_OPTIONS_INIT;
	const char *mode = getenv("TAILNODE_TEST_MODE");
	o.hostname = hostname;
	o.flags = TAILNODE_STATE_MEMORY | TAILNODE_EPHEMERAL;
	o.mode = mode && !strcmp(mode, "isolated") ? TAILNODE_ISOLATED : TAILNODE_IN_PROCESS;
	return o;
}

static inline int isolated(void) { return options(NULL).mode == TAILNODE_ISOLATED; }

static inline tailnode_node up(const char *hostname) {
	tailnode_options o = options(hostname);
	tailnode_node n;
	OK(tailnode_new(&o, &n, &err));
	OK(tailnode_up(n, 30000, &err));
	return n;
}

static inline void write_all(int fd, const void *p, size_t n) {
	const char *b = (const char *)p;
	while (n) {
		ssize_t k = send(fd, b, n, MSG_NOSIGNAL);
		CHECK(k > 0);
		b += k;
		n -= (size_t)k;
	}
}

static inline void read_all(int fd, void *p, size_t n) {
	char *b = (char *)p;
	while (n) {
		ssize_t k = read(fd, b, n);
		CHECK(k > 0);
		b += k;
		n -= (size_t)k;
	}
}

static inline void wait_in(int fd, int ms) {
	struct pollfd p;
	memset(&p, 0, sizeof p);
	p.fd = fd;
	p.events = POLLIN;
	CHECK(poll(&p, 1, ms) == 1);
}
#endif
