// defaults.c - what a node takes from the program around it: its name, its directory, its environment. The same in both modes.
#include "check.h"

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

int main(void) {
	alarm(120);
	char dir[] = "/tmp/tailnode-defaults-XXXXXX";
	CHECK(mkdtemp(dir) && setenv("XDG_CONFIG_HOME", dir, 1) == 0);
	named(dir);
	printf("defaults: ok\n");
	char rm[100];
	snprintf(rm, sizeof rm, "rm -rf %s", dir);
	return system(rm);
}
