/* What a sidecar gives up before it says that it is ready. */
#ifndef MC_SANDBOX_H
#define MC_SANDBOX_H

/* Drops every capability of the calling process for good, sets no_new_privs and forbids core dumps (which would hold guest
 * data). Call it before any other thread exists: all three are per thread. Returns 0, or the errno of the step in *step. */
int mc_sandbox_enter(const char **step);

#endif
