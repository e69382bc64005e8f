// bench.c - what the hand-over through descriptors costs. testnet/../gobench does the same in Go; `make -C cabi bench` alternates.
#include "check.h"

#include <dirent.h>
#include <stdint.h>
#include <sys/resource.h>

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

static pid_t helper;

// Processor time of this process, and of the helper where there is one.
static double cpu(void) {
	struct timespec ts;
	clockid_t other;
	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &ts);
	double t = (double)ts.tv_sec + (double)ts.tv_nsec * 1e-9;
	if (helper && clock_getcpuclockid(helper, &other) == 0 && clock_gettime(other, &ts) == 0)
		t += (double)ts.tv_sec + (double)ts.tv_nsec * 1e-9;
	return t;
}

static void say(const char *what, double value) { printf("%s\t%s\t%.2f\n", isolated() ? "isolated" : "in process", what, value); }

static void usage(pid_t pid, int connections, const char *whose) {
	char path[64], what[100];
	long pages = 0, threads = -2;
	snprintf(path, sizeof path, "/proc/%d/statm", (int)pid);
	FILE *f = fopen(path, "r");
	CHECK(f && fscanf(f, "%*s %ld", &pages) == 1);
	fclose(f);
	snprintf(path, sizeof path, "/proc/%d/task", (int)pid);
	DIR *d = opendir(path);
	while (d && readdir(d))
		threads++;
	closedir(d);
	snprintf(what, sizeof what, "%s, %d connections: RSS, MB", whose, connections);
	say(what, (double)pages * (double)sysconf(_SC_PAGESIZE) / 1e6);
	snprintf(what, sizeof what, "%s, %d connections: threads", whose, connections);
	say(what, (double)threads);
}

// Memory and threads of the host, and of its helper, with connections that have been used and are open.
static void memory(void) {
	static int fd[1000];
	static const int at[] = {0, 10, 1000};
	struct rlimit rl;
	getrlimit(RLIMIT_NOFILE, &rl);
	rl.rlim_cur = rl.rlim_max;
	setrlimit(RLIMIT_NOFILE, &rl);
	int open = 0;
	char c[8];
	for (size_t k = 0; k < sizeof at / sizeof *at; k++) {
		for (; open < at[k]; open++) {
			OK(tailnode_dial(a, "tcp", "gopeer:7", 0, 30000, &fd[open], NULL, NULL, &err));
			write_all(fd[open], "question", 8);
			read_all(fd[open], c, 8);
		}
		tailnode_stats st = {.size = sizeof st};
		OK(tailnode_trim(a, &err));
		OK(tailnode_runtime_stats(a, &st, &err));
		usage(getpid(), open, "host");
		helper = isolated() ? (pid_t)st.pid : 0;
		if (helper)
			usage((pid_t)st.pid, open, "helper");
	}
	for (int i = 0; i < open; i++)
		close(fd[i]);
}

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
	memory();

	OK(tailnode_dial(a, "tcp", "gopeer:9", 0, 30000, &fd, NULL, NULL, &err));
	write_all(fd, buf, sizeof buf);
	double t = now(), c = cpu();
	for (uint64_t left = total; left; left -= sizeof buf)
		write_all(fd, buf, sizeof buf);
	shutdown(fd, SHUT_WR);
	read_all(fd, n8, 8);
	double send = (double)total * 8e-9 / (now() - t), send_cpu = (cpu() - c) * 1e9 / (double)total;
	close(fd);

	OK(tailnode_dial(a, "tcp", "gopeer:19", 0, 30000, &fd, NULL, NULL, &err));
	be64(n8, total);
	t = now(), c = cpu();
	write_all(fd, n8, 8);
	uint64_t got = 0;
	ssize_t k;
	while ((k = read(fd, buf, sizeof buf)) > 0)
		got += (uint64_t)k;
	CHECK(got == total);
	double receive = (double)total * 8e-9 / (now() - t), receive_cpu = (cpu() - c) * 1e9 / (double)total;
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
	t = now(), c = cpu();
	for (int i = 0; i < 8; i++)
		CHECK(pthread_create(&th[i], NULL, dialer, &each) == 0);
	for (int i = 0; i < 8 * each; i++) {
		OK(tailnode_accept(ln, 0, &fd, NULL, NULL, &err));
		CHECK(write(fd, "x", 1) == 1);
		close(fd);
	}
	for (int i = 0; i < 8; i++)
		pthread_join(th[i], NULL);
	double rate = 8 * each / (now() - t), rate_cpu = (cpu() - c) * 1e3 / (8 * each);

	t = now();
	tailnode_addr v4;
	for (int i = 0; i < 10000; i++)
		OK(tailnode_addresses(a, &v4, NULL, &err));
	double call = (now() - t) * 1e6 / 10000;
	say("send, Gbit/s", send);
	say("send, CPU seconds per GB", send_cpu);
	say("receive, Gbit/s", receive);
	say("receive, CPU seconds per GB", receive_cpu);
	say("round trip of 1 byte, p50, us", rtt[ROUNDS / 2]);
	say("round trip of 1 byte, p99, us", rtt[ROUNDS * 99 / 100]);
	say("dialled, accepted and closed, 1/s", rate);
	say("dialled, accepted and closed, CPU ms", rate_cpu);
	say("a call (the node's addresses), us", call);
	OK(tailnode_close(a, &err));
	OK(tailnode_close(b, &err));
	return 0;
}
