// The DALI operator fn.spd.augment_views: decoded images and rows of parameters in, views out.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "../augment_views.h"
#include "../views_check.h"
#include "dali/pipeline/operator/checkpointing/stateless_operator.h"
#include "dali/pipeline/operator/operator.h"
#include "kept_memory.h"

namespace spd {

// What an operator is told when the pipeline is built.
struct ViewsFormat {
    explicit ViewsFormat(const ::dali::OpSpec& spec);

    int height, width;
    DType dtype;
    ::dali::DALIDataType stored;  // bfloat16 is stored as its bits: DALI has no such type
    bool channels_last, views_first;
    float scale[3], shift[3];  // stored value = view * scale + shift, per channel

    size_t itemsize() const { return ::dali::TypeTable::GetTypeInfo(stored).size(); }
    // Of one sample. With views_first the samples are equal parts of the batch's memory, which as a
    // whole is (views, images, ...).
    ::dali::TensorShape<> sample_shape(int views) const;
    const char* layout() const { return views_first ? "" : channels_last ? "FHWC" : "FCHW"; }
    // Strides of (views, images, 3, height, width) in elements.
    std::array<int64_t, 5> strides(int views, int64_t images) const;
};

// Checks the inputs, and copies the rows (images, views) into one table; returns how many views.
int read_rows(const ViewsFormat& format, const ::dali::TensorListShape<>& images,
              ::dali::DALIDataType type, const ::dali::TensorList<::dali::CPUBackend>& params,
              std::vector<ViewParams>* table);

template <class Backend>
class AugmentViews : public ::dali::StatelessOperator<Backend> {
  public:
    explicit AugmentViews(const ::dali::OpSpec& spec)
        : ::dali::StatelessOperator<Backend>(spec), format_(spec) {}

  protected:
    bool SetupImpl(std::vector<::dali::OutputDesc>& outputs, const ::dali::Workspace& ws) override {
        const auto& images = ws.Input<Backend>(0);
        views_ = read_rows(format_, images.shape(), images.type(), ws.Input<::dali::CPUBackend>(1),
                           &rows_);
        outputs.resize(1);
        outputs[0] = {
            ::dali::uniform_list_shape(images.num_samples(), format_.sample_shape(views_)),
            format_.stored};
        // DALI keeps memory of GPUs that it has used before, but not that of CPUs.
        return std::is_same<Backend, ::dali::GPUBackend>::value;
    }
    void RunImpl(::dali::Workspace& ws) override;

  private:
    ViewsFormat format_;
    int views_ = 0;
    std::vector<ViewParams> rows_;  // (images, views)
    KeptMemory memory_;             // of the CPU backend
};

}  // namespace spd
