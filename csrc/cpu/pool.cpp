#include "cpu/pool.h"

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace honeytrace {
namespace {

// Caller's code may have set flush-to-zero or another rounding on its own thread. The bits of an answer must not
// depend on the thread that computes it, so each thread works under the default floating-point control word.
class DefaultFloatControl {
public:
#if defined(__x86_64__)
    DefaultFloatControl() : saved_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(0x1F80u); }
    ~DefaultFloatControl() { __builtin_ia32_ldmxcsr(saved_); }

private:
    unsigned saved_;
#elif defined(__aarch64__)
    DefaultFloatControl() {
        __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
        __asm__ volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
    }
    ~DefaultFloatControl() { __asm__ volatile("msr fpcr, %0" : : "r"(saved_)); }

private:
    uint64_t saved_;
#endif
};

struct Job {
    const std::function<void(size_t)>& body;
    size_t items;
    std::atomic<size_t> next{0};
    std::mutex failure_lock;
    std::exception_ptr failure;

    Job(const std::function<void(size_t)>& body_, size_t items_) : body(body_), items(items_) {}

    void work() noexcept {
        const DefaultFloatControl control;
        for (size_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) {
            try {
                body(item);
            } catch (...) {
                const std::lock_guard<std::mutex> hold(failure_lock);
                if (!failure) failure = std::current_exception();
                next.store(items, std::memory_order_relaxed);
            }
        }
    }

    void rethrow() const {
        if (failure) std::rethrow_exception(failure);
    }
};

class Pool {
public:
    // False when another caller has the pool.
    bool try_run(Job& job, size_t helpers) {
        const std::unique_lock<std::mutex> caller(caller_, std::try_to_lock);
        if (!caller.owns_lock()) return false;
        {
            const std::lock_guard<std::mutex> hold(state_);
            start_workers(helpers);
            job_ = &job;
            open_places_ = helpers;
        }
        wake_.notify_all();
        job.work();
        std::unique_lock<std::mutex> hold(state_);
        job_ = nullptr;  // who has not come yet need not
        open_places_ = 0;
        done_.wait(hold, [this] { return working_ == 0; });
        return true;
    }

    size_t workers() {
        const std::lock_guard<std::mutex> hold(state_);
        return workers_;
    }

private:
    // A system that gives no more threads is no error: fewer help.
    void start_workers(size_t wanted) {
        while (workers_ < wanted) {
            try {
                std::thread(&Pool::serve, this).detach();
            } catch (const std::system_error&) {
                return;
            }
            ++workers_;
        }
    }

    void serve() {
        std::unique_lock<std::mutex> hold(state_);
        for (;;) {
            wake_.wait(hold, [this] { return open_places_ > 0; });
            --open_places_;
            ++working_;
            Job* job = job_;
            hold.unlock();
            job->work();
            hold.lock();
            if (--working_ == 0) done_.notify_one();
        }
    }

    std::mutex caller_;
    std::mutex state_;
    std::condition_variable wake_, done_;
    Job* job_ = nullptr;
    size_t open_places_ = 0, working_ = 0, workers_ = 0;
};

// The pool is never destroyed: its threads sleep in it until the process ends. A forked child has none of the
// threads and perhaps a lock that nobody will release, so it forgets the pool and makes its own when it needs one.
std::atomic<Pool*> current_pool{nullptr};
std::mutex& making_lock() {
    static std::mutex* lock = new std::mutex;
    return *lock;
}

thread_local bool inside_call = false;

#if defined(__unix__) || defined(__APPLE__)
void before_fork() { making_lock().lock(); }
void after_fork_in_parent() { making_lock().unlock(); }
void after_fork_in_child() {
    current_pool.store(nullptr);
    inside_call = false;
    making_lock().unlock();
}
#endif

Pool& pool() {
    Pool* found = current_pool.load(std::memory_order_acquire);
    if (found != nullptr) return *found;
    const std::lock_guard<std::mutex> hold(making_lock());
    found = current_pool.load(std::memory_order_acquire);
    if (found == nullptr) {
#if defined(__unix__) || defined(__APPLE__)
        static const int registered = pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
        (void)registered;
#endif
        found = new Pool;
        current_pool.store(found, std::memory_order_release);
    }
    return *found;
}

}  // namespace

void parallel_for(size_t items, size_t threads, const std::function<void(size_t)>& body) {
    Job job(body, items);
    const size_t useful = threads < items ? threads : items;
    if (useful > 1 && !inside_call) {
        inside_call = true;
        const bool ran = pool().try_run(job, useful - 1);
        inside_call = false;
        if (ran) return job.rethrow();
    }
    job.work();
    job.rethrow();
}

size_t pool_workers() {
    Pool* found = current_pool.load(std::memory_order_acquire);
    return found == nullptr ? 0 : found->workers();
}

}  // namespace honeytrace
