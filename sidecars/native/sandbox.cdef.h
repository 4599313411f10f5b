int mc_sandbox_enter(const char **step);
