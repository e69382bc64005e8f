// bench.c - what the hand-over through descriptors costs. testnet/../gobench does the same in Go; `make -C cabi bench` alternates.
#include <stdint.h>

#include "check.h"

static double now(void) {
	struct timespec ts;
	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (double)ts.tv_sec + (double)ts.tv_nsec * 1e-9;
}

static void be64(char *b, uint64_t v) {
	for (int i = 7; i >= 0; i--, v >>= 8)
		b[i] = (char)v;
}

static int by_value(const void *a, const void *b) {
	double d = *(const double *)a - *(const double *)b;
	return d < 0 ? -1 : d > 0;
}

static tailnode_node a, b;
static int ln;

static void *dialer(void *p) {
	for (int i = 0; i < *(int *)p; i++) {
		int fd;
		char c;
		OK(tailnode_dial(a, "tcp", "cbenchb:80", 0, 30000, &fd, NULL, NULL, NULL));
		CHECK(read(fd, &c, 1) == 1);
		close(fd);
	}
	return NULL;
}

int main(int argc, char **argv) {
	uint64_t total = (argc > 1 ? strtoull(argv[1], NULL, 10) : 512) << 20;
	alarm(200);
	a = up("cbencha");
	static char buf[256 << 10];
	char n8[8];
	int fd;

	OK(tailnode_dial(a, "tcp", "gopeer:9", 0, 30000, &fd, NULL, NULL, &err));
	write_all(fd, buf, sizeof buf);
	double t = now();
	for (uint64_t left = total; left; left -= sizeof buf)
		write_all(fd, buf, sizeof buf);
	shutdown(fd, SHUT_WR);
	read_all(fd, n8, 8);
	double send = (double)total * 8e-9 / (now() - t);
	close(fd);

	OK(tailnode_dial(a, "tcp", "gopeer:19", 0, 30000, &fd, NULL, NULL, &err));
	be64(n8, total);
	t = now();
	write_all(fd, n8, 8);
	uint64_t got = 0;
	ssize_t k;
	while ((k = read(fd, buf, sizeof buf)) > 0)
		got += (uint64_t)k;
	CHECK(got == total);
	double receive = (double)total * 8e-9 / (now() - t);
	close(fd);

	enum { ROUNDS = 10000 };
	static double rtt[ROUNDS];
	OK(tailnode_dial(a, "tcp", "gopeer:7", 0, 30000, &fd, NULL, NULL, &err));
	for (int i = -1000; i < ROUNDS; i++) {
		t = now();
		write_all(fd, "x", 1);
		read_all(fd, n8, 1);
		if (i >= 0)
			rtt[i] = (now() - t) * 1e6;
	}
	close(fd);
	qsort(rtt, ROUNDS, sizeof *rtt, by_value);

	b = up("cbenchb");
	OK(tailnode_listen(b, "tcp", ":80", 0, &ln, NULL, &err));
	pthread_t th[8];
	int each = 250;
	OK(tailnode_dial(a, "tcp", "cbenchb:80", 0, 30000, &fd, NULL, NULL, &err));
	close(fd);
	OK(tailnode_accept(ln, 0, &fd, NULL, NULL, &err));
	close(fd);
	t = now();
	for (int i = 0; i < 8; i++)
		CHECK(pthread_create(&th[i], NULL, dialer, &each) == 0);
	for (int i = 0; i < 8 * each; i++) {
		OK(tailnode_accept(ln, 0, &fd, NULL, NULL, &err));
		CHECK(write(fd, "x", 1) == 1);
		close(fd);
	}
	for (int i = 0; i < 8; i++)
		pthread_join(th[i], NULL);
	double rate = 8 * each / (now() - t);

	t = now();
	tailnode_addr v4;
	for (int i = 0; i < 10000; i++)
		OK(tailnode_addresses(a, &v4, NULL, &err));
	double call = (now() - t) * 1e6 / 10000;
	printf("C %-10s send %5.2f Gbit/s  receive %5.2f Gbit/s  rtt p50 %5.1f p99 %6.1f us  connections %5.0f/s  call %5.1f us\n", isolated() ? "isolated" : "in process", send, receive,
	       rtt[ROUNDS / 2], rtt[ROUNDS * 99 / 100], rate, call);
	OK(tailnode_close(a, &err));
	OK(tailnode_close(b, &err));
	return 0;
}
