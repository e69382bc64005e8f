// defaults.c - what a node takes from the program around it: its name, its directory, its environment. The same in both modes.
#include "check.h"

#include <sys/stat.h>

static int exists(const char *dir, const char *name) {
	char path[200];
	snprintf(path, sizeof path, "%s/%s", dir, name);
	return access(path, F_OK) == 0;
}

// Without a name and a directory: the program's, not the helper's, and below what the environment says now.
static void named(const char *dir) {
	char want[200];
	tailnode_options o = options(NULL);
	tailnode_node n;
	char *json;
	o.flags = TAILNODE_EPHEMERAL;
	OK(tailnode_new(&o, &n, &err));
	OK(tailnode_up(n, 30000, &err));
	OK(tailnode_status(n, 0, &json, NULL, &err));
	snprintf(want, sizeof want, "\"HostName\":\"%s\"", program_invocation_short_name);
	if (!strstr(json, want))
		FAIL("no %s in %s", want, json);
	tailnode_free(json);
	OK(tailnode_close(n, &err));
	snprintf(want, sizeof want, "tailnode-%s", program_invocation_short_name);
	CHECK(exists(dir, want) && !exists(dir, "tailnode-tailnode-helper"));
	// There is no place.
	CHECK(setenv("XDG_CONFIG_HOME", "relative", 1) == 0);
	OK(tailnode_new(&o, &n, &err));
	WANT(tailnode_start(n, &err), TAILNODE_INVALID_ARGUMENT);
	OK(tailnode_close(n, &err));
	o.flags |= TAILNODE_STATE_MEMORY;
	OK(tailnode_new(&o, &n, &err));
	OK(tailnode_start(n, &err));
	OK(tailnode_close(n, &err));
}

// Relative paths are those of the working directory of when the node was made, also for a helper that is started again.
static void relative(const char *dir) {
	tailnode_options o = options("cdefaults");
	tailnode_node n;
	tailnode_addr before, after;
	o.flags = isolated() ? TAILNODE_RESTART : 0;
	o.dir = "state";
	CHECK(chdir(dir) == 0 && mkdir("elsewhere", 0700) == 0);
	if (isolated()) {
		tailnode_options m = options("cdefaults");
		tailnode_stats st = {.size = sizeof st};
		char path[64];
		OK(tailnode_new(&m, &n, &err));
		OK(tailnode_runtime_stats(n, &st, &err));
		char real[4096] = "";
		snprintf(path, sizeof path, "/proc/%d/exe", (int)st.pid);
		CHECK(readlink(path, real, sizeof real - 1) > 0 && symlink(real, "helper") == 0);
		OK(tailnode_close(n, &err));
		o.helper_path = "./helper";
	}
	OK(tailnode_new(&o, &n, &err));
	CHECK(chdir("elsewhere") == 0);
	OK(tailnode_up(n, 30000, &err));
	OK(tailnode_addresses(n, &before, NULL, &err));
	CHECK(exists(dir, "state") && !exists(dir, "elsewhere/state"));
	if (isolated()) {
		tailnode_stats st = {.size = sizeof st};
		int w, code;
		tailnode_event ev;
		OK(tailnode_runtime_stats(n, &st, &err));
		OK(tailnode_watch(n, 0, &w, &err));
		CHECK(kill((pid_t)st.pid, SIGKILL) == 0);
		while ((code = tailnode_read_event(w, &ev, &err)) == 0) // to its end
			;
		close(w);
		while ((code = tailnode_up(n, 30000, &err)) == TAILNODE_CORE_LOST) // sent while it still died
			;
		OK(code);
		OK(tailnode_addresses(n, &after, NULL, &err));
		CHECK(!memcmp(&before, &after, sizeof after) && !exists(dir, "elsewhere/state"));
	}
	OK(tailnode_close(n, &err));
}

// A key that the program has taken out of its environment is not used, although a runtime that is linked in has a copy of it.
static void removed(void) {
	tailnode_options o = options("cdefaults");
	tailnode_node n;
	tailnode_event ev;
	int w;
	CHECK(unsetenv("TS_AUTHKEY") == 0);
	OK(tailnode_new(&o, &n, &err));
	OK(tailnode_watch(n, 0, &w, &err));
	do {
		OK(tailnode_read_event(w, &ev, &err));
		CHECK(ev.state != TAILNODE_STATE_RUNNING);
	} while (ev.state != TAILNODE_STATE_NEEDS_LOGIN);
	close(w);
	OK(tailnode_close(n, &err));
}

int main(void) {
	alarm(120);
	char dir[] = "/tmp/tailnode-defaults-XXXXXX";
	CHECK(mkdtemp(dir) && setenv("XDG_CONFIG_HOME", dir, 1) == 0);
	named(dir);
	relative(dir);
	removed();
	printf("defaults: ok\n");
	char rm[100];
	snprintf(rm, sizeof rm, "rm -rf %s", dir);
	return system(rm);
}
