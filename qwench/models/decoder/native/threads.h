// Loops that threads share, by the calls of OpenMP that GCC's and LLVM's libraries both have: PyTorch has loaded one of them.
#pragma once

extern "C" {
void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned flags);
int omp_get_thread_num(void);
int omp_get_num_threads(void);
}

// Calls work(thread, number of threads) in each of at most `threads` threads; returns when all are done.
template <class Work> inline void in_threads(int threads, Work work) {
    if (threads == 1) return work(0, 1);
    GOMP_parallel([](void* data) { (*(Work*)data)(omp_get_thread_num(), omp_get_num_threads()); }, &work, threads, 0);
}

// Calls work(index) for [0, count), neighbours in one thread.
template <class Work> inline void by_threads(int threads, long count, Work work) {
    in_threads(threads, [&](long thread, long number) {
        for (long index = count * thread / number; index < count * (thread + 1) / number; index++) work(index);
    });
}
