// Threads: those of OpenMP, on the libgomp that torch brought, handed work and lined up by our own
// spinning. libgomp itself sleeps at every barrier once a process holds more OpenMP threads than
// cores, as a second thread with a region of its own brings about; a step has hundreds of barriers.
#pragma once

namespace tml {

using TeamBody = void (*)(const void* context, int thread, int num_threads);

// body on up to num_threads threads, thread 0 the caller's; returns when all are done. A call from
// inside a body runs on one thread.
void team_parallel(int num_threads, TeamBody body, const void* context);

// Each thread of the running body waits for the others.
void team_barrier();

// run on the calling thread; the other threads stay at hand for its calls of team_parallel.
void with_team(int num_threads, void (*run)(const void* context), const void* context);

}  // namespace tml
