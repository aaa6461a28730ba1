// Memory of batches, used again once nobody holds the batch.
#pragma once

#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace spd {

// The first write to fresh memory enters the kernel at every page, which takes longer than making
// the views. Blocks that were let go are kept, as many as a few batches in flight need, on huge
// pages where there are any. They may be let go from any thread, and after this object is gone.
class KeptMemory {
  public:
    std::shared_ptr<void> take(size_t bytes) {
        void* block = nullptr;
        {
            std::lock_guard<std::mutex> lock(kept_->mutex);
            if (kept_->bytes != bytes) kept_->clear();
            kept_->bytes = bytes;
            if (!kept_->blocks.empty()) {
                block = kept_->blocks.back();
                kept_->blocks.pop_back();
            }
        }
        if (!block) block = allocate(bytes);
        return {block, [kept = kept_, bytes](void* done) { kept->give(done, bytes); }};
    }

  private:
    static constexpr size_t huge_page = 2 << 20, most_blocks = 4;

    static void* allocate(size_t bytes) {
        const size_t rounded = (bytes + huge_page - 1) / huge_page * huge_page;
        void* block = aligned_alloc(huge_page, rounded);
        if (!block) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
        madvise(block, rounded, MADV_HUGEPAGE);
#endif
        return block;
    }

    struct Kept {
        std::mutex mutex;
        std::vector<void*> blocks;
        size_t bytes = 0;

        void give(void* block, size_t size) {
            std::lock_guard<std::mutex> lock(mutex);
            if (size == bytes && blocks.size() < most_blocks) {
                blocks.push_back(block);
            } else {
                free(block);
            }
        }
        void clear() {
            for (void* block : blocks) free(block);
            blocks.clear();
        }
        ~Kept() { clear(); }
    };
    std::shared_ptr<Kept> kept_ = std::make_shared<Kept>();
};

}  // namespace spd
