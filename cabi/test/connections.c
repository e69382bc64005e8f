// connections.c - threads and memory with 0, 10, 200 and 1000 open connections that are all used.
#include <dirent.h>
#include <sys/resource.h>

#include "check.h"

static int threads(void) {
	int n = -2;
	DIR *d = opendir("/proc/self/task");
	while (d && readdir(d))
		n++;
	closedir(d);
	return n;
}

int main(void) {
	alarm(120);
	struct rlimit rl;
	getrlimit(RLIMIT_NOFILE, &rl);
	rl.rlim_cur = rl.rlim_max;
	setrlimit(RLIMIT_NOFILE, &rl);
	tailnode_node n = up("cmany");
	static int fd[1000];
	int open = 0, at[] = {0, 10, 200, 1000}, base = 0;
	for (size_t k = 0; k < sizeof at / sizeof *at; k++) {
		for (; open < at[k]; open++)
			OK(tailnode_dial(n, "tcp", "gopeer:7", 0, 30000, &fd[open], NULL, NULL, &err));
		char b[8];
		for (int i = 0; i < open; i++)
			write_all(fd[i], "question", 8);
		for (int i = 0; i < open; i++)
			read_all(fd[i], b, 8);
		tailnode_stats st = {.size = sizeof st};
		OK(tailnode_trim(n, &err));
		OK(tailnode_runtime_stats(n, &st, &err));
		long pages = 0;
		FILE *f = fopen("/proc/self/statm", "r");
		CHECK(f && fscanf(f, "%*s %ld", &pages) == 1);
		fclose(f);
		printf("connections: %4d: %d threads in the host, %llu in Go; Go heap %llu kB, from the system %llu kB; RSS of the host %ld kB\n", open, threads(),
		       (unsigned long long)st.threads, (unsigned long long)st.heap_live / 1024, (unsigned long long)st.total / 1024, pages * 4);
		if (k == 1)
			base = threads();
		if (k > 1)
			CHECK(threads() <= base + 8 + sysconf(_SC_NPROCESSORS_ONLN)); // the runtime may have added some of its few; 200 is another matter
	}
	for (int i = 0; i < open; i++)
		close(fd[i]);
	OK(tailnode_close(n, &err));
	printf("connections: ok\n");
	return 0;
}
