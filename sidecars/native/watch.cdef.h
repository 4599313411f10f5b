struct mc_watch;
