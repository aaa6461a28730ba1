// The Python module spd_fast._C: numpy arrays in, arrays written in place. It checks whatever could
// make the kernels read or write out of bounds, releases the GIL, and spreads the items over
// threads. Here: the choice of the instruction set, memory, and the module itself.

#include "bindings.h"

#include <cstdlib>
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace spd {

#define SPD_DECLARE(isa)     \
    SPD_DECLARE_AUGMENT(isa) \
    SPD_DECLARE_GAUSSIAN(isa) SPD_DECLARE_KCENTER(isa) SPD_DECLARE_NEAREST(isa)
#define SPD_KERNELS(isa, name, supported) \
    {name,                                \
     SPD_FLAGS_##isa,                     \
     supported,                           \
     isa::augment_image,                  \
     isa::mahalanobis,                    \
     isa::gaussian_update,                \
     isa::gaussian_factor,                \
     isa::kcenter_begin,                  \
     isa::kcenter_advance,                \
     isa::nearest_neighbors}

#ifdef SPD_HAVE_v2
SPD_DECLARE(v2)
SPD_DECLARE(v3)
SPD_DECLARE(v4)

static bool has_v2() {
    return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
}
static bool has_v3() {
    return has_v2() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("lzcnt") &&
           __builtin_cpu_supports("movbe");
}
static bool has_v4() {
    return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
}
static const Kernels all_kernels[] = {SPD_KERNELS(v4, "x86-64-v4", has_v4()),
                                      SPD_KERNELS(v3, "x86-64-v3", has_v3()),
                                      SPD_KERNELS(v2, "x86-64-v2", has_v2())};
#else
SPD_DECLARE(baseline)
static const Kernels all_kernels[] = {SPD_KERNELS(baseline, "baseline", true)};
#endif

// Chosen once, at import: the best this processor has, or what SPD_FAST_ISA names.
static const Kernels* choose_kernels() {
    const char* asked = std::getenv("SPD_FAST_ISA");
    std::string known;
    for (const Kernels& k : all_kernels) {
        if (k.supported && (!asked || std::string(asked) == k.name)) return &k;
        if (k.supported) known += std::string(known.empty() ? "" : ", ") + k.name;
    }
    throw py::import_error(
        "SPD_FAST_ISA=" + std::string(asked ? asked : "(unset)") +
        " is not available; this processor and build have: " + (known.empty() ? "none" : known));
}
const Kernels* kernels = nullptr;

// Asks for huge pages behind the array. The first write to a fresh page enters the kernel; with
// 4 KiB pages that takes longer than making the views that are written.
static void advise_huge_pages(const py::array& a) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t huge = 2 << 20;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(a.data()) + huge - 1) / huge * huge;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(a.data()) + a.nbytes()) / huge * huge;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)a;
#endif
}

// Gives the whole pages behind an array back to the system; what was in them is lost.
static void give_back(const py::array& a) {
#ifdef __linux__
    require(a.writeable(), "only memory that may be written to can be given back");
    const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE)), at = uintptr_t(a.data());
    const uintptr_t begin = (at + page - 1) / page * page, end = (at + a.nbytes()) / page * page;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
#else
    (void)a;
#endif
}

static py::dict build_config() {
    py::dict config;
    py::list available;
    for (const Kernels& k : all_kernels)
        if (k.supported) available.append(k.name);
    config["instruction_set"] = kernels->name;
    config["instruction_sets"] = available;
#ifdef _OPENMP
    config["openmp"] = true;
#else
    config["openmp"] = false;
#endif
    config["compiler"] = __VERSION__;
    config["flags_of_views"] = kernels->flags_of_views;
#ifdef SPD_HAVE_CUDA
    config["cuda"] = cuda_config();
#else
    config["cuda"] = "not built";
#endif
    return config;
}

}  // namespace spd

PYBIND11_MODULE(_C, m) {
    spd::kernels = spd::choose_kernels();
    m.doc() = "Compiled kernels of spd_fast; call them through spd_fast.ops.";
    m.def("build_config", &spd::build_config);
    m.def("advise_huge_pages", &spd::advise_huge_pages);
    m.def("give_back", &spd::give_back);
    spd::bind_views(m);
    spd::bind_padim(m);
    spd::bind_patchcore(m);
#ifdef SPD_HAVE_CUDA
    spd::bind_cuda(m);
#endif
}
