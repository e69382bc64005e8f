// cycles.c - opens and closes, and counts what is left: descriptors, threads, memory.
#include <dirent.h>

#include "check.h"

static int count(const char *dir) {
	int n = 0;
	DIR *d = opendir(dir);
	while (d && readdir(d))
		n++;
	closedir(d);
	return n;
}

static long rss_kb(void) {
	long pages = 0;
	FILE *f = fopen("/proc/self/statm", "r");
	CHECK(f && fscanf(f, "%*s %ld", &pages) == 1);
	fclose(f);
	return pages * 4;
}

static tailnode_node n;

static void round_(int i) {
	int fd, ln;
	char b[64];
	// The peer closes first: TIME_WAIT, a minute and some kilobytes per connection (RFC 9293 §3.3.2), is on its side.
	OK(tailnode_dial(n, "tcp", "gopeer:20", 0, 30000, &fd, NULL, NULL, &err));
	while (read(fd, b, sizeof b) > 0)
		;
	close(fd);
	if (i % 10 == 0) {
		OK(tailnode_listen(n, "tcp", ":0", 0, &ln, NULL, &err));
		close(ln);
		OK(tailnode_listen_packet(n, "udp", ":0", 0, &ln, NULL, &err));
		close(ln);
		OK(tailnode_watch(n, 0, &ln, &err));
		close(ln);
	}
}

static void settle(void) { // what is closed goes a moment later
	tailnode_stats st = {.size = sizeof st};
	for (int i = 0;; i++) {
		OK(tailnode_runtime_stats(n, &st, &err));
		if (st.connections == 0)
			break;
		CHECK(i < 60000);
		poll(NULL, 0, 1);
	}
	OK(tailnode_trim(n, &err));
}

static int settled(int fds) { // the descriptors, when they are as few as they were, or have had half a minute for it
	int now = 0;
	for (int i = 0; i < 6000 && (now = count("/proc/self/fd")) > fds; i++)
		poll(NULL, 0, 5);
	return now;
}

int main(int argc, char **argv) {
	int rounds = argc > 1 ? atoi(argv[1]) : 10000;
	alarm(220);
	n = up("ccycles");
	for (int i = 0; i < rounds / 10; i++)
		round_(i);
	settle();
	int fds = count("/proc/self/fd"), threads = count("/proc/self/task");
	long rss = rss_kb();
	for (int i = 0; i < rounds; i++)
		round_(i);
	settle();
	int fds2 = settled(fds);
	int threads2 = count("/proc/self/task");
	long rss2 = rss_kb();
	tailnode_stats st = {.size = sizeof st};
	OK(tailnode_runtime_stats(n, &st, &err));
	printf("cycles: live heap %llu kB; %d: descriptors %d -> %d, threads %d -> %d, RSS %ld -> %ld kB\n", (unsigned long long)st.heap_live / 1024, rounds, fds, fds2, threads, threads2, rss, rss2);
	CHECK(fds2 <= fds + 2 && threads2 <= threads + 8 + sysconf(_SC_NPROCESSORS_ONLN) && rss2 < rss + 16384);
	// Nodes, whole.
	OK(tailnode_close(n, &err));
	int before = count("/proc/self/fd");
	for (int i = 0; i < rounds / 500; i++) {
		n = up("cagain");
		OK(tailnode_close(n, &err));
	}
	CHECK(settled(before) <= before + 2);
	printf("cycles: ok\n");
	return 0;
}
