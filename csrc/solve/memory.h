// Uninitialised memory for tiles and panels.
#pragma once

#include <cstdint>
#include <new>

namespace tersor::solve {

template <class T>
class Memory {
 public:
  explicit Memory(int64_t count)
      : data_(static_cast<T*>(::operator new(sizeof(T) * count, kAlignment))) {}
  ~Memory() { ::operator delete(data_, kAlignment); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  T* data() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  T* data_;
};

}  // namespace tersor::solve
