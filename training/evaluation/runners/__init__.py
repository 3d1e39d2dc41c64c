"""Answer the items of a suite: a checkpoint in this process, a server over HTTP, the baseline cascade."""
