// forks.c - a child of the host that lives on, with copies of its descriptors: resets and ends reach the parent all the same.
#include "check.h"

#define CHILDREN 30
static pid_t child[CHILDREN + 1];

static pid_t keeper(void) {
	pid_t pid = fork();
	CHECK(pid >= 0);
	if (pid == 0)
		for (;;)
			pause();
	return pid;
}

static void want_reset(int fd) {
	char b;
	wait_in(fd, 30000);
	CHECK(read(fd, &b, 1) < 0 && errno == ECONNRESET);
	close(fd);
}

// Connections are made and reset while the children are.
static volatile int done;
static void *churn(void *p) {
	tailnode_error e;
	int fd;
	for (int i = 0; i < 20 || !__atomic_load_n(&done, __ATOMIC_ACQUIRE); i++) {
		if (tailnode_dial(*(tailnode_node *)p, "tcp", "gopeer:13", 0, 30000, &fd, NULL, NULL, &e))
			FAIL("dial: %s", e.message);
		write_all(fd, "x", 1);
		want_reset(fd);
	}
	return NULL;
}

int main(void) {
	alarm(120);
	tailnode_node n = up("cforks");
	int echo, reset, ln, w, udp, c;
	tailnode_event ev;
	tailnode_addr any;
	char b[4];
	size_t len;
	OK(tailnode_dial(n, "tcp", "gopeer:7", 0, 30000, &echo, NULL, NULL, &err));
	OK(tailnode_dial(n, "tcp", "gopeer:13", 0, 30000, &reset, NULL, NULL, &err));
	OK(tailnode_listen(n, "tcp", ":80", 0, &ln, NULL, &err));
	OK(tailnode_listen_packet(n, "udp", ":0", 0, &udp, &any, &err));
	OK(tailnode_watch(n, 0, &w, &err));
	child[CHILDREN] = keeper();
	write_all(reset, "x", 1);
	want_reset(reset);
	pthread_t t[2];
	for (int i = 0; i < 2; i++)
		CHECK(pthread_create(&t[i], NULL, churn, &n) == 0);
	for (int i = 0; i < CHILDREN; i++)
		child[i] = keeper();
	__atomic_store_n(&done, 1, __ATOMIC_RELEASE);
	for (int i = 0; i < 2; i++)
		CHECK(pthread_join(t[i], NULL) == 0);
	write_all(echo, "ping", 4);
	read_all(echo, b, 4);
	OK(tailnode_close(n, &err));
	want_reset(echo);
	wait_in(ln, 30000);
	WANT(tailnode_accept(ln, 0, &c, NULL, NULL, &err), TAILNODE_CLOSED);
	wait_in(udp, 30000);
	WANT(tailnode_recvfrom(udp, b, sizeof b, &len, &any, &err), TAILNODE_CLOSED);
	int code;
	do
		wait_in(w, 30000);
	while ((code = tailnode_read_event(w, &ev, &err)) == 0);
	WANT(code, TAILNODE_CLOSED);
	for (int i = 0; i <= CHILDREN; i++) // which have lived until here
		CHECK(waitpid(child[i], NULL, WNOHANG) == 0 && kill(child[i], SIGKILL) == 0 && waitpid(child[i], NULL, 0) == child[i]);
	printf("forks: ok\n");
	return 0;
}
