// handover.c - what moving bytes between two threads of this machine costs, by each means that the host and the core could use. `make -C cabi
// bench-handover`; docs/c-abi.md has the table and the choice. Each line is the median of some rounds, which alternate.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define DIE(x) (perror(x), exit(1))

static uint64_t total;

struct means {
	const char *name;
	int type;   // of the socket; 0: a pipe; -1: a ring
	int buffer; // bytes asked for; 0: the system's
	size_t piece;
	int marked; // read as the core does, which leaves the last byte: count, read, peek
	double gbit[16], cpu[16];
};

// A ring in shared memory: one writer, one reader, an eventfd each for "there is data" and "there is room", written only where the other end sleeps.
struct ring {
	_Atomic uint64_t head, tail;
	_Atomic int reader_sleeps, writer_sleeps;
	int data, room;
	size_t size;
	char *buf;
};

static void nap(_Atomic int *flag, int fd, _Atomic uint64_t *word, uint64_t seen) {
	atomic_store(flag, 1);
	uint64_t v;
	if (atomic_load(word) == seen && read(fd, &v, 8) < 0)
		DIE("eventfd");
	atomic_store(flag, 0);
}

static void wake(_Atomic int *flag, int fd) {
	if (atomic_exchange(flag, 0) && write(fd, &(uint64_t){1}, 8) < 0)
		DIE("eventfd");
}

static void ring_copy(struct ring *r, char *b, size_t n, int in) {
	uint64_t at = atomic_load_explicit(in ? &r->head : &r->tail, memory_order_relaxed);
	size_t o = at % r->size, k = n < r->size - o ? n : r->size - o;
	if (in) {
		memcpy(r->buf + o, b, k);
		memcpy(r->buf, b + k, n - k);
	} else {
		memcpy(b, r->buf + o, k);
		memcpy(b + k, r->buf, n - k);
	}
	atomic_store(in ? &r->head : &r->tail, at + n);
}

static struct ring ring;

struct end {
	struct means *m;
	int fd;
};

static void *reader(void *p) {
	struct end *e = p;
	size_t size = 128 << 10;
	char *b = malloc(size);
	for (uint64_t got = 0; got < total;) {
		ssize_t n;
		if (e->m->type < 0) {
			uint64_t head = atomic_load(&ring.head), have = head - got;
			if (!have) {
				nap(&ring.reader_sleeps, ring.data, &ring.head, got);
				continue;
			}
			n = (ssize_t)(have < size ? have : size);
			ring_copy(&ring, b, (size_t)n, 0);
			wake(&ring.writer_sleeps, ring.room);
		} else if (e->m->marked) {
			int queued = 0;
			char last;
			struct pollfd w = {.fd = e->fd, .events = POLLIN};
			if (poll(&w, 1, -1) < 0 || ioctl(e->fd, FIONREAD, &queued) < 0)
				DIE("poll");
			n = recv(e->fd, b, (size_t)queued < size ? (size_t)queued : size, 0);
			(void)!recv(e->fd, &last, 1, MSG_PEEK | MSG_DONTWAIT);
		} else {
			n = read(e->fd, b, size);
		}
		if (n <= 0)
			DIE("read");
		got += (uint64_t)n;
	}
	free(b);
	return NULL;
}

static double seconds(clockid_t c) {
	struct timespec ts;
	clock_gettime(c, &ts);
	return (double)ts.tv_sec + (double)ts.tv_nsec * 1e-9;
}

static void run(struct means *m, int round) {
	int fd[2];
	if (m->type > 0 && socketpair(AF_UNIX, m->type | SOCK_CLOEXEC, 0, fd) < 0)
		DIE("socketpair");
	if (m->type == 0 && (pipe2(fd, O_CLOEXEC) < 0 || (m->buffer && fcntl(fd[1], F_SETPIPE_SZ, m->buffer) < 0)))
		DIE("pipe");
	for (int i = 0; m->type > 0 && m->buffer && i < 2; i++) {
		setsockopt(fd[i], SOL_SOCKET, SO_SNDBUF, &m->buffer, sizeof m->buffer);
		setsockopt(fd[i], SOL_SOCKET, SO_RCVBUF, &m->buffer, sizeof m->buffer);
	}
	if (m->type < 0) {
		memset(&ring, 0, sizeof ring);
		ring.size = (size_t)m->buffer;
		ring.buf = mmap(NULL, ring.size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
		ring.data = eventfd(0, EFD_CLOEXEC);
		ring.room = eventfd(0, EFD_CLOEXEC);
	}
	char *b = calloc(1, m->piece);
	struct end e = {m, m->type < 0 ? -1 : fd[0]};
	pthread_t t;
	double from = seconds(CLOCK_MONOTONIC), cpu = seconds(CLOCK_PROCESS_CPUTIME_ID);
	if (pthread_create(&t, NULL, reader, &e))
		DIE("pthread_create");
	for (uint64_t sent = 0; sent < total;) {
		ssize_t n = (ssize_t)(total - sent < m->piece ? total - sent : m->piece);
		if (m->type < 0) {
			uint64_t tail = atomic_load(&ring.tail), room = ring.size - (sent - tail);
			if (!room) {
				nap(&ring.writer_sleeps, ring.room, &ring.tail, tail);
				continue;
			}
			n = (uint64_t)n < room ? n : (ssize_t)room;
			ring_copy(&ring, b, (size_t)n, 1);
			wake(&ring.reader_sleeps, ring.data);
		} else {
			n = write(fd[1], b, (size_t)n);
		}
		if (n <= 0)
			DIE("write");
		sent += (uint64_t)n;
	}
	pthread_join(t, NULL);
	m->gbit[round] = (double)total * 8e-9 / (seconds(CLOCK_MONOTONIC) - from);
	m->cpu[round] = (seconds(CLOCK_PROCESS_CPUTIME_ID) - cpu) * 1e9 / (double)total;
	free(b);
	if (m->type >= 0) {
		close(fd[0]);
		close(fd[1]);
	} else {
		munmap(ring.buf, ring.size);
		close(ring.data);
		close(ring.room);
	}
}

static int by_value(const void *a, const void *b) { return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b); }

int main(int argc, char **argv) {
	int rounds = argc > 1 ? atoi(argv[1]) : 5;
	total = (argc > 2 ? strtoull(argv[2], NULL, 10) : 1024) << 20;
	if (rounds < 1 || rounds > 16)
		return 2;
	static struct means all[] = {
	    {.name = "stream, 4 KB writes", .type = SOCK_STREAM, .piece = 4 << 10},
	    {.name = "stream, 16 KB writes", .type = SOCK_STREAM, .piece = 16 << 10},
	    {.name = "stream, 64 KB writes", .type = SOCK_STREAM, .piece = 64 << 10},
	    {.name = "stream, 256 KB writes", .type = SOCK_STREAM, .piece = 256 << 10},
	    {.name = "stream, 64 KB writes, 64 KB buffers", .type = SOCK_STREAM, .piece = 64 << 10, .buffer = 64 << 10},
	    {.name = "stream, 64 KB writes, 1 MB buffers", .type = SOCK_STREAM, .piece = 64 << 10, .buffer = 1 << 20},
	    {.name = "stream, 64 KB writes, marked", .type = SOCK_STREAM, .piece = 64 << 10, .marked = 1},
	    {.name = "seqpacket, 64 KB messages", .type = SOCK_SEQPACKET, .piece = 64 << 10},
	    {.name = "pipe, 64 KB writes", .type = 0, .piece = 64 << 10},
	    {.name = "pipe, 64 KB writes, 1 MB buffer", .type = 0, .piece = 64 << 10, .buffer = 1 << 20},
	    {.name = "shared ring of 256 KB, eventfd, 64 KB", .type = -1, .piece = 64 << 10, .buffer = 256 << 10},
	    {.name = "shared ring of 1 MB, eventfd, 64 KB", .type = -1, .piece = 64 << 10, .buffer = 1 << 20},
	    {.name = "shared ring of 1 MB, eventfd, 4 KB", .type = -1, .piece = 4 << 10, .buffer = 1 << 20},
	};
	enum { N = sizeof all / sizeof *all };
	for (int r = 0; r < rounds; r++)
		for (int i = 0; i < N; i++)
			run(&all[i], r);
	printf("%-40s %14s %14s\n", "", "Gbit/s", "CPU s per GB");
	for (int i = 0; i < N; i++) {
		qsort(all[i].gbit, (size_t)rounds, sizeof(double), by_value);
		qsort(all[i].cpu, (size_t)rounds, sizeof(double), by_value);
		printf("%-40s %14.1f %14.3f\n", all[i].name, all[i].gbit[rounds / 2], all[i].cpu[rounds / 2]);
	}
	return 0;
}
